"""What a comparison runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

from pipelines.compare.config import REGIMES
from pipelines.compare.names import lr_of, method_of
from pipelines.config.checks import at_least, one_of, share

EXTRA_RATES = 2
"""Step sizes beyond the grid."""


@dataclass(frozen=True)
class Options:
    """What one comparison runs. Trials that are done already are not run again."""

    methods: Tuple[str, ...] = ("circadian", "naive", "joint", "replay_25", "replay_50")
    """Names of methods, with settings or without (`method_of`)."""
    seeds: Tuple[int, ...] = (0, 1, 2)
    """Seeds of the base, of batches and of replay."""
    orders: Tuple[str, ...] = ("A", "reverse")
    """A: as configured; reverse; random-N: a permutation drawn with seed N."""
    regimes: Tuple[str, ...] = ("whole",)
    """Names out of `REGIMES`."""
    grid: Tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    """Step sizes that every method is tuned over, on order A with a seed of its own; where the best one is at an edge,
    twice or half of it is tried as well, `EXTRA_RATES` times at most."""
    tuning_seed: int = 1000
    """Seed of tuning; none of the seeds that are reported."""
    tuned_in: str = "whole"
    """The regime that tuning is done in; a name out of `REGIMES`."""
    tuning_share: float = 0.5
    """Share of every source's bytes (stream.max_source_bytes) that tuning reads."""
    epochs: float = 2.0
    """Total FLOPs, in plain training steps over the whole stream (2: every token twice)."""
    scratch: bool = False
    """Start from random weights instead of a base."""

    def __post_init__(self) -> None:
        one_of("--tuned-in", self.tuned_in, tuple(REGIMES))
        for name in dict.fromkeys((*self.regimes, self.tuned_in)):
            one_of("--regimes", name, tuple(REGIMES))
            dear = [m for m in self.methods if method_of(m).night.wake == "all"]
            if REGIMES[name].asleep and dear:
                raise ValueError(
                    f"--regimes: {name} leaves less than a full step per token, which {', '.join(dear)} spends awake; "
                    "compare them apart"
                )
        if len(self.grid) < 1:
            raise ValueError("--grid is empty; give step sizes to tune over")
        at_least("--epochs", self.epochs, 0.5)
        share("tuning_share", self.tuning_share)
        tuned = [name for name in self.methods if lr_of(name) is None]
        if tuned and self.tuning_seed in self.seeds:
            raise ValueError(f"--seeds {self.seeds} contain the tuning seed {self.tuning_seed}; choose other seeds")
