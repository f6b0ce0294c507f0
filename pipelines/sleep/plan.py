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
    trained_steps: int = 0
    """Steps that the trainer it goes on from has taken (sleep.carry=trainer)."""
    store_seed: int = 0
    """Seed of what a bounded store holds; the same for all rounds of a run."""
    dreams_stored: int = 0
    """Dreams that earlier rounds left in the store."""

    def to_json(self) -> Dict[str, Any]:
        """As a JSON-able mapping."""
        return asdict(self)


def num_steps(cfg: SleepConfig, first_key: int, last_key: int) -> int:
    """Steps of a round over the experiences first_key .. last_key.

    Rounds add up: however the stream is cut, about sleep.tokens_per_token tokens are trained on per token streamed. A
    setting of 0 trains nothing; otherwise a round has one step at least.
    """
    if not cfg.tokens_per_token:
        return 0
    done, due = (math.floor(cfg.tokens_per_token * rows / cfg.batch + 1e-9) for rows in (first_key, last_key + 1))
    return min(max(1, due - done), cfg.max_steps or due + 1)
