"""What a candidate must hold to go live: part of the configuration of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Dict

from nl_model.checks import at_least, must, one_of, share

BOUNDS = ("mean", "low", "high")


@dataclass(frozen=True)
class GateConfig:
    """The test a candidate must pass before it goes live. Figures in bits per byte unless said; .inf for no bound."""

    sequences: int = 4
    """Held-out sequences per source (half of them at most) that the gate decides on; reports are made of the others."""
    max_forgetting: float = 0.25
    """Most a candidate may lose on any source seen before, against the anchor; .inf for no bound."""
    budgets: Dict[str, float] = field(default_factory=dict)
    """The same for single sources, by name, in place of max_forgetting."""
    max_drift: float = math.inf
    """Most a candidate may lose on any source seen before, against the best release so far; .inf for no bound."""
    max_regression: float = 0.05
    """Most a candidate may lose on the mean over all sources seen, against the anchor; .inf for no bound."""
    min_progress: float = -0.1
    """What a candidate must gain at least on the mean over the round's recent sources, against the anchor, at the
    favourable end of its interval; -.inf for no bound. Below zero: what is known need not get better every round."""
    max_awake_loss: float = 0.3
    """Most a candidate may lose on the recent sources' mean against the awake model, at the favourable end of its
    interval; .inf for no bound."""
    max_divergence: float = 1.0
    """Most nats per token (KL) by which a candidate may part from the anchor on older sources' prompts, on average;
    .inf for no bound, and then it is not measured."""
    max_mismatch: float = 0.02
    """Most nats per token by which the loss of a candidate's weights may differ, on its training's last batch, from
    the loss that the student had there; .inf for no bound."""
    bound: str = "mean"
    """What is held against the first four budgets: the mean of a change, or an end of its interval. low: rejects only
    what surely loses too much. high: promotes only what surely does not."""
    confidence: float = 0.95
    """Coverage of the intervals (paired bootstrap over the probes' sequences)."""
    samples: int = 1000
    """Bootstrap samples of an interval."""
    prompts: int = 2
    """Fixed prompts per source on which the divergence from the anchor is measured."""
    patience: int = 2
    """Rejections in a row after which the plan of the next rounds changes."""
    recent_factor: float = 0.5
    """Factor of sleep.recent at every such change: less recent experience, more replay."""
    step_factor: float = 0.5
    """Factor of the pool's step size at every such change."""

    def __post_init__(self) -> None:
        at_least("gate.sequences", self.sequences, 1)
        at_least("gate.max_forgetting", self.max_forgetting, 0, endless=True)
        for source, budget in self.budgets.items():
            at_least(f"gate.budgets.{source}", budget, 0, endless=True)
        for key in ("max_drift", "max_awake_loss", "max_divergence", "max_mismatch"):
            at_least(f"gate.{key}", getattr(self, key), 0, endless=True)
        number = "be a number of bits per byte"
        must("gate.max_regression", self.max_regression, self.max_regression > -math.inf, f"{number}, or .inf for none")
        must("gate.min_progress", self.min_progress, self.min_progress < math.inf, f"{number}, or -.inf for none")
        one_of("gate.bound", self.bound, BOUNDS)
        share("gate.confidence", self.confidence)
        at_least("gate.samples", self.samples, 100)
        at_least("gate.prompts", self.prompts, 1)
        at_least("gate.patience", self.patience, 1)
        share("gate.recent_factor", self.recent_factor)
        share("gate.step_factor", self.step_factor)
