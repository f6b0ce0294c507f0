"""What a comparison runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Tuple

from nl_model.checks import at_least, one_of, share
from pipelines.compare.methods import lr_of, method_of

REGIMES: Dict[str, float] = {"whole": 0.0, "cap5": 0.05, "cap1": 0.01}
"""Bytes of the past that replay may hold, as a share of the stream's configured bytes; 0: all. By name."""
CLOCKS = ("fixed", "speeds")


@dataclass(frozen=True)
class Options:
    """What one comparison runs. Trials that are done already are not run again."""

    methods: Tuple[str, ...] = ("circadian", "replay", "naive", "joint")
    """Names of methods, with changes or without (`method_of`)."""
    seeds: Tuple[int, ...] = (0, 1, 2)
    """Seeds of the base, of batches and of replay."""
    orders: Tuple[str, ...] = ("A", "reverse")
    """A: as configured; reverse; random-N: a permutation drawn with seed N."""
    regimes: Tuple[str, ...] = ("whole",)
    """Names out of `REGIMES`."""
    grid: Tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """Step sizes that every method is tuned over, on order A with a seed of its own; widened where the best one is at
    an edge (pipelines/compare/widening.py)."""
    widenings: int = 3
    """Most step sizes beyond the grid, the same for every method; a grid of one is no question and is not widened."""
    tuning_seed: int = 1000
    """Seed of tuning; none of the seeds that are reported."""
    tuned_in: str = "whole"
    """The regime that tuning is done in; a name out of `REGIMES`."""
    tuning_share: float = 0.5
    """Share of every source's bytes (stream.max_source_bytes) that tuning reads."""
    epochs: float = 2.0
    """FLOPs of every method, in full training steps per token of the stream (sleep.epochs)."""
    clock: str = "fixed"
    """fixed: releases are adopted one period after their mark. speeds: when simulated time has it so, the pool being as
    fast as it must be to need a period for a period's round."""
    looks: int = 20
    """How often the served model is measured along the stream. Only who measures knows how long that is."""

    def __post_init__(self) -> None:
        for name in dict.fromkeys((*self.regimes, self.tuned_in)):
            one_of("--regimes", name, tuple(REGIMES))
        one_of("--clock", self.clock, CLOCKS)
        if not self.grid or min(self.grid) <= 0:
            raise ValueError(f"--grid {self.grid} must hold step sizes above 0 to tune over, such as 1e-3,2e-3,4e-3")
        at_least("--epochs", self.epochs, 0.5)
        at_least("looks", self.looks, 1)
        at_least("widenings", self.widenings, 0)
        share("tuning_share", self.tuning_share)
        tuned = [name for name in self.methods if method_of(name) and lr_of(name) is None]
        if tuned and self.tuning_seed in self.seeds:
            raise ValueError(f"--seeds {self.seeds} contain the tuning seed {self.tuning_seed}; choose other seeds")

    @property
    def most(self) -> int:
        """Most step sizes that tuning tries of a method."""
        return len(self.grid) + (self.widenings if len(self.grid) > 1 else 0)
