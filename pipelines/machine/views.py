"""What the machine knows of the parts that run now. It dies with the process; a restart begins anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from pipelines.machine.actions import StartRound
from pipelines.machine.records import RoundRecord


@dataclass
class Learner:
    """What the machine knows of the learner that runs."""

    started: bool = False
    up: bool = False
    calls: int = 0
    """Calls in flight, the one that restores it included."""
    released: int = 0
    """Release that it computes with."""
    ended: bool = False
    finished: bool = False
    """Whether it was told to pin the stream's end."""


@dataclass
class Pool:
    """What the pool is doing."""

    job: str = ""
    """base, score, warm, round, publish or dreams; empty: nothing."""
    warm: bool = False
    start: Optional[StartRound] = None
    record: Optional[RoundRecord] = None


@dataclass
class Service:
    """What is asked of the experience service."""

    started: bool = False
    up: bool = False
    asked: str = ""
    """base or dreams, while an answer is due."""
