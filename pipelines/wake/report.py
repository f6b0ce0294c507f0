"""What the learner tells: what a step did, what a call did, and where a round is due. Plain values between rooms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, Tuple

PINNED = "fast-"
"""How files of weights begin that a mark pins; their stream position in tokens follows."""


@dataclass(frozen=True)
class StepReport:
    """What one wake step saw and did."""

    tokens: int
    """Stream position after the step, in tokens."""
    seconds: float
    """Wall time of the step."""
    waited: float
    """Of these, seconds spent waiting for the experience to be durable."""
    bpb: Dict[str, float]
    """Online loss per source in bits per byte, measured before learning."""
    surprise: Dict[str, float]
    """The same in nats per token."""
    recalled: Dict[str, float]
    """Online loss per source in bits per byte when the model is read together with recall; empty without recall."""
    bytes: Dict[str, int]
    """Bytes per source that these losses are of."""
    written: Tuple[str, ...]
    """Levels written at the end of the step."""
    quarantined: Tuple[Tuple[int, str, str], ...]
    """(key, source, reason) of sequences that were not learned from."""
    flops: float = 0.0
    """FLOPs of the step."""


@dataclass(frozen=True)
class Mark:
    """A point of the stream at which a round is due: what the round pins."""

    tokens: int
    """Stream position, in tokens."""
    snapshot: int
    """Store version that holds everything up to here."""
    last_key: int
    """Last stream key up to here."""
    fast: str
    """File of the learner's unshifted weights, relative to the run directory."""
    why: Dict[str, Any] = field(default_factory=dict)
    """Why a round is due here (pipelines/wake/trigger.py): policy, text, figures."""


@dataclass(frozen=True)
class Adoption:
    """A release that the learner has taken over."""

    release: int
    """Its number."""
    tokens: int
    """Stream position at which it was adopted."""
    shift: float
    """Norm of what the learner's own levels were shifted by."""


@dataclass(frozen=True)
class Look:
    """The served model at a moment: the live release with the fast levels as they stand, beside the release alone."""

    tokens: int
    """Stream position."""
    release: int
    """Number of the release that was adopted last."""
    served: Dict[str, float]
    """Bits per byte by source, of every source seen so far, on text that no gate, trigger or sampler sees."""
    rested: Dict[str, float]
    """The same of the release alone."""
    seconds: float = 0.0
    """Wall time that it took: no time of the learner's, as it serves people alone."""


@dataclass(frozen=True)
class LearnerReport:
    """What one call of the learner did."""

    tokens: int = 0
    """Stream position after it."""
    release: int = 0
    """Release that the learner computes with."""
    cursor: Dict[str, Any] = field(default_factory=dict)
    """Where the stream stands."""
    steps: Tuple[StepReport, ...] = ()
    seconds: float = 0.0
    """Learner's wall time since the last report, gaps between calls included."""
    marks: Tuple[Mark, ...] = ()
    """Rounds that are due, oldest first. After a restart: the newest that the checkpoint remembers, told before or
    not."""
    adopted: Tuple[Adoption, ...] = ()
    looks: Tuple[Look, ...] = ()
    spans: Dict[str, Tuple[int, int]] = field(default_factory=dict)
    """First and last stream position of every source seen so far, in tokens."""
    quarantined: Tuple[Tuple[str, str, str], ...] = ()
    """(source, origin, reason) of documents that the corpus refused so far."""
    ended: bool = False
    """The stream has nothing more."""
    stopped: bool = False
    """The learner was asked to stop; it has checkpointed."""
