"""Faults of a simulated run: what fails when, as a pure function of a seed, so that a schedule can be run again."""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Counter as Counts


@dataclass(frozen=True)
class Faults:
    """Probabilities, each per occasion."""

    seed: int = 0
    learner: float = 0.0
    """The learner dies in a call."""
    pool: float = 0.0
    """A rank dies in a round, or while the pool starts."""
    publish: float = 0.0
    """A candidate cannot be published."""
    services: float = 0.0
    """The service dies while something is stored."""
    users: float = 0.0
    """Of these failures, those that trying again does not help."""
    late: float = 0.0
    """Of these failures, those whose answer comes all the same, later."""
    stop: float = 0.0
    """The run is asked to stop, per event."""
    crash: float = 0.0
    """The driver's process dies before an action."""
    most: int = 20
    """Most faults of a schedule; then all goes well, so that every schedule ends."""


class Dice:
    """Draws of one schedule. Each kind has a stream of its own: what one part does changes no other part's faults."""

    def __init__(self, faults: Faults) -> None:
        self.faults, self.left = faults, faults.most
        self.drawn: Counts[str] = Counter()
        self.struck: Counts[str] = Counter()

    def share(self, kind: str) -> float:
        """The next number of a stream, uniform in [0, 1)."""
        self.drawn[kind] += 1
        return zlib.crc32(f"{self.faults.seed}/{kind}/{self.drawn[kind]}".encode()) / 2**32

    def strikes(self, kind: str) -> bool:
        """Whether a fault of a kind happens at this occasion."""
        chance = float(getattr(self.faults, kind))
        if not chance or self.left <= 0 or self.share(kind) >= chance:
            return False
        self.left -= 1
        self.struck[kind] += 1
        return True

    def among(self, kind: str) -> bool:
        """Whether a fault that has happened is of a kind."""
        chance = float(getattr(self.faults, kind))
        return chance > 0 and self.share(kind) < chance
