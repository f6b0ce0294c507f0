"""Restarts left, by part. They live in memory: the same command, given again, starts with full budgets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict

from pipelines.config.schema import FailureConfig


@dataclass
class Budgets:
    """Each part of a run may die only so often before the run gives up."""

    full: Dict[str, int]
    left: Dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.refill()

    @classmethod
    def of(cls, cfg: FailureConfig) -> Budgets:
        """Full budgets."""
        return cls({"learner": cfg.learner, "pool": cfg.pool, "services": cfg.services})

    def spend(self, part: str) -> bool:
        """Take one restart; False where none is left."""
        if self.left[part] <= 0:
            return False
        self.left[part] -= 1
        return True

    def refill(self) -> None:
        """Give all their budgets back: a round that went well shows that the parts work."""
        self.left = dict(self.full)

    def used_up(self, part: str, cause: str) -> str:
        """What to say when there is none left."""
        return (
            f"{part} failed {self.full[part] + 1} times, failures.{part}={self.full[part]} restarts are used up; "
            f"last error: {cause}. Run the same command to continue."
        )
