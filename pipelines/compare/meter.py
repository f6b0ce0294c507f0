"""FLOPs, counted as they are spent, by what they are spent on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict

from nl_model.flops import forward_flops, full_step_flops, wake_step_flops
from pipelines.config.schema import Config


@dataclass
class Meter:
    """The ledger of one trial. Prices are FLOPs per token."""

    forward: int
    full: int
    wake: int
    spent: Dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, cfg: Config, vocab_size: int) -> Meter:
        """Prices of a configuration's model."""
        shape = (cfg.model, cfg.levels, vocab_size)
        return cls(forward_flops(*shape), full_step_flops(*shape), wake_step_flops(*shape))

    def spend(self, what: str, flops: float) -> None:
        """Add to one item."""
        self.spent[what] = self.spent.get(what, 0.0) + flops

    @property
    def total(self) -> float:
        """FLOPs spent so far."""
        return sum(self.spent.values())
