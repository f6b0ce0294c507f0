"""What a candidate must hold to go live: part of the configuration of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipelines.checks import at_least


@dataclass(frozen=True)
class GateConfig:
    """The test a candidate must pass before it goes live. Figures in bits per byte."""

    max_forgetting: float = 0.25
    """Most a candidate may lose on any source seen before, against the anchor."""
    max_regression: float = 0.05
    """Most a candidate may lose on the mean over all sources seen, against the anchor."""

    def __post_init__(self) -> None:
        at_least("gate.max_forgetting", self.max_forgetting, 0)
        if math.isnan(self.max_regression):
            raise ValueError("gate.max_regression=nan is no bound; give bits per byte, or .inf for none")
