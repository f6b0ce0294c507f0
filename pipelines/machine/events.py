"""What a driver tells the machine. Whatever a part answers carries the attempt that was asked: late answers of a part
that was given up since are dropped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Dict, Optional, Tuple, Union

from pipelines.machine.records import ReleaseFact, RoundRecord
from pipelines.wake.report import LearnerReport

LEARNER, POOL, SERVICES, CONTROL = "learner", "pool", "services", "control"
ADVANCE, FINISH, ADOPT = "advance", "finish", "adopt"


@dataclass(frozen=True)
class Started:
    """The driver runs, for the first time or again: what it found on disk."""

    newest: Optional[ReleaseFact] = None
    """The newest published release, if any."""
    missing_audit: int = 0
    """Entries of the audit log that are in neither state nor file."""


@dataclass(frozen=True)
class ServiceReady:
    """The experience service answers."""

    part: ClassVar[str] = SERVICES
    attempt: int


@dataclass(frozen=True)
class BaseStored:
    """The base mixture is durable."""

    part: ClassVar[str] = SERVICES
    attempt: int


@dataclass(frozen=True)
class DreamsStored:
    """A release's dreams are durable."""

    part: ClassVar[str] = SERVICES
    attempt: int
    release: int


@dataclass(frozen=True)
class LearnerReady:
    """A learner stands at its newest checkpoint."""

    part: ClassVar[str] = LEARNER
    attempt: int
    report: LearnerReport


@dataclass(frozen=True)
class Advanced:
    """The learner answered a call."""

    part: ClassVar[str] = LEARNER
    attempt: int
    report: LearnerReport
    call: str = ADVANCE
    """advance, finish or adopt."""


@dataclass(frozen=True)
class BaseReady:
    """Release 0 is there."""

    part: ClassVar[str] = POOL
    attempt: int
    rows: int
    """Sequences of the base mixture, which the store is to hold."""
    flops: float = 0.0


@dataclass(frozen=True)
class BaseScored:
    """Release 0 on the probes."""

    part: ClassVar[str] = POOL
    attempt: int
    bpb: Dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PoolReady:
    """The pool's ranks are up."""

    part: ClassVar[str] = POOL
    attempt: int


@dataclass(frozen=True)
class RoundJudged:
    """A candidate was trained and judged; it is not published yet."""

    part: ClassVar[str] = POOL
    attempt: int
    record: RoundRecord


@dataclass(frozen=True)
class RoundFailed:
    """A round came to no candidate: a rank died, or the pool did not start."""

    part: ClassVar[str] = POOL
    attempt: int
    cause: str
    users: bool = False
    """Trying again cannot help: bad input, a full disk."""


@dataclass(frozen=True)
class Published:
    """A promoted candidate is a release on disk."""

    part: ClassVar[str] = POOL
    attempt: int


@dataclass(frozen=True)
class PublishFailed:
    """It could not be made one."""

    part: ClassVar[str] = POOL
    attempt: int
    cause: str
    users: bool = False


@dataclass(frozen=True)
class PartFailed:
    """The learner, the service, the controls, or the pool outside of a round died or did not answer."""

    part: str
    attempt: int
    cause: str
    users: bool = False
    service_alive: bool = True
    """Learner: whether the service answered when asked afterwards. A learner that could not log has died of that."""


@dataclass(frozen=True)
class ControlTrained:
    """A control has ended."""

    part: ClassVar[str] = CONTROL
    attempt: int
    trial: str
    """Its name (pipelines/machine/control.py): strategy and step size."""
    rows: Tuple[Dict[str, Any], ...]
    flops: float


@dataclass(frozen=True)
class ControlDone:
    """All controls have ended."""

    part: ClassVar[str] = CONTROL
    attempt: int


@dataclass(frozen=True)
class SummaryBuilt:
    """The run is in figures."""


@dataclass(frozen=True)
class StopRequested:
    """Finish the step, checkpoint, end."""


@dataclass(frozen=True)
class StopDeadline:
    """The learner had its time to end."""


Event = Union[
    Started,
    ServiceReady,
    BaseStored,
    DreamsStored,
    LearnerReady,
    Advanced,
    BaseReady,
    BaseScored,
    PoolReady,
    RoundJudged,
    RoundFailed,
    Published,
    PublishFailed,
    PartFailed,
    ControlTrained,
    ControlDone,
    SummaryBuilt,
    StopRequested,
    StopDeadline,
]
