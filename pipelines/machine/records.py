"""The record of a round: what trained, what the gate said, what it cost. A value; JSON only at the edge."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Dict, Mapping, Optional, Tuple

if TYPE_CHECKING:  # records are read by commands that load no torch
    from pipelines.gate.decision import Decision
    from pipelines.sleep.plan import RoundPlan

PROMOTED = "promoted"


@dataclass(frozen=True)
class RoundRecord:
    """A round that was trained and judged, as it stands in the state, in summary.json and in a release's index."""

    id: int
    """Number of the round, from 1."""
    tokens: int
    """Stream position that it pinned."""
    anchor: int
    """Release that it started from."""
    release: Optional[int]
    """Release that its candidate became; None where it was rejected, or before it is published."""
    steps: int
    decision: str
    """promoted or rejected."""
    snapshot: int = 0
    """Version of the experience store."""
    seconds: float = 0.0
    recent_scale: float = 1.0
    lr_scale: float = 1.0
    fingerprint: str = ""
    """Of the candidate's weights."""
    reason: str = ""
    """What the gate said, in words."""
    figures: Dict[str, Any] = field(default_factory=dict)
    """What the gate decided on (pipelines/gate/decision.py)."""
    row: Dict[str, float] = field(default_factory=dict)
    """Bits per byte of the candidate by source, on held-out text that no decision sees: a row of the matrix."""
    loss: Dict[str, float] = field(default_factory=dict)
    """Mean losses of its training, by term."""
    flops: float = 0.0
    optimizer_bytes: Tuple[int, ...] = ()
    """Of every rank."""
    backend: str = ""
    """Of the process group."""
    trainer: str = "cold"
    """What its training went on from: cold (nothing but the anchor's weights), continued (what the last round left),
    resumed (an earlier attempt), or none (nothing was trained)."""
    dreams: Optional[Dict[str, Any]] = None
    """Its dreams (pipelines/dreams/report.py); None where it dreamt nothing."""

    @classmethod
    def judged(cls, plan: RoundPlan, decision: Decision) -> RoundRecord:
        """What plan and decision say of a round, whoever trained it; no release yet, and nothing that was measured."""
        return cls(
            id=plan.round,
            tokens=plan.tokens,
            anchor=plan.anchor,
            release=None,
            steps=plan.steps,
            decision=decision.word,
            snapshot=plan.snapshot,
            recent_scale=plan.recent_scale,
            lr_scale=plan.lr_scale,
            reason=decision.reason,
            figures=decision.figures,
        )

    @property
    def promoted(self) -> bool:
        """Whether the gate let the candidate go live."""
        return self.decision == PROMOTED

    def to_json(self) -> Dict[str, Any]:
        """As a JSON-able mapping."""
        plain = {**vars(self), "optimizer_bytes": list(self.optimizer_bytes)}
        if not self.dreams:
            del plain["dreams"]
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> RoundRecord:
        """What `to_json` gave; records of older runs lack what came later."""
        return cls(**{**plain, "optimizer_bytes": tuple(plain.get("optimizer_bytes", ()))})


@dataclass(frozen=True)
class ReleaseFact:
    """A release as it lies on disk: what a start must know of the newest one."""

    number: int
    last_key: int
    """Last stream key that it has been trained on."""
    tokens: int
    """Stream position of the snapshot that made it."""
    fingerprint: str = ""
    record: Optional[RoundRecord] = None
    """The round that made it; None for the base and for a release that restores another."""
    restores: Optional[int] = None
    """The release whose weights it makes live again."""
