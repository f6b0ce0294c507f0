"""When to sleep: part of the configuration of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import List

from nl_model.checks import above, at_least, one_of, share

POLICIES = ("tokens", "time", "surprise", "saturation", "idle")
BY_THE_CLOCK = ("time", "idle")
"""Policies that depend on wall time."""


@dataclass(frozen=True)
class WhenConfig:
    """When a round is due: as soon as any policy says so, at the next boundary of the learner's levels."""

    policies: List[str] = field(default_factory=lambda: ["tokens"])
    """tokens: every period of the pool's fastest level. time: every when.seconds. surprise: the online loss has shifted
    upwards. saturation: the fast levels are far from their rest. idle: the stream pauses. Its end always counts."""
    least: float = 0.1
    """Least share of that period between two rounds (policy tokens excepted)."""
    seconds: float = 3600.0
    """Seconds of wall time between rounds."""
    drift_slack: float = 0.5
    """Shift of the online loss that is put up with, in standard deviations (half the shift to be found); 0: none."""
    drift_threshold: float = 10.0
    """Accumulated excess over it that means a change, in standard deviations."""
    drift_warmup: int = 32
    """Steps from which mean and deviation of the online loss are first estimated."""
    saturation: float = 0.1
    """Distance of the fast weights from their rest state, relative to its norm, that means saturation."""
    idle_seconds: float = 60.0
    """Seconds without input that mean a pause of the stream."""

    def __post_init__(self) -> None:
        for policy in self.policies:
            one_of("when.policies", policy, POLICIES)
        share("when.least", self.least)
        above("when.seconds", self.seconds, 0)
        at_least("when.drift_slack", self.drift_slack, 0)
        above("when.drift_threshold", self.drift_threshold, 0)
        at_least("when.drift_warmup", self.drift_warmup, 2)
        above("when.saturation", self.saturation, 0)
        above("when.idle_seconds", self.idle_seconds, 0)

    def check_deterministic(self) -> None:
        """ValueError where a policy goes by the clock: a deterministic run cannot depend on it."""
        for policy in self.policies:
            if policy in BY_THE_CLOCK:
                raise ValueError(
                    f"when.policies has {policy!r}, which goes by the clock, but run.deterministic=true; drop one"
                )
