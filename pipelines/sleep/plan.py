"""What a round is a function of: its plan, and how many steps it has."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Dict

from pipelines.config.sleep import SleepConfig


@dataclass(frozen=True)
class RoundPlan:
    """Everything a round is a function of. The same plan gives the same candidate."""

    round: int
    """Number of the round, from 1."""
    snapshot: int
    """Version of the experience store."""
    first_key: int
    """First stream key that counts as recent."""
    last_key: int
    """Last stream key of the snapshot."""
    fast: str
    """File of the fast snapshot, relative to the run directory."""
    anchor: int
    """Release that the student starts from and that serves as anchor."""
    tokens: int
    """Stream position of the snapshot, in tokens."""
    steps: int
    """Steps to train."""
    seed: int
    """Seed of its batches."""
    recent_scale: float = 1.0
    """Factor of sleep.recent (pipelines/machine/replan.py)."""
    lr_scale: float = 1.0
    """Factor of the pool's step size."""
    dreams_stored: int = 0
    """Dreams that earlier rounds left in the store."""

    def to_json(self) -> Dict[str, Any]:
        """As a JSON-able mapping."""
        return asdict(self)


def num_steps(cfg: SleepConfig, recent: int) -> int:
    """Steps of a round over `recent` new experiences."""
    steps = max(1, math.ceil(cfg.tokens_per_token * recent / cfg.batch))
    return min(steps, cfg.max_steps) if cfg.max_steps else steps
