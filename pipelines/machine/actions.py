"""What the machine has a driver do, in the order given. A crash may cut a list anywhere; what `Commit` saved counts.

Actions that start something are answered by an event; the driver carries them out beside its loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple, Union

from pipelines.machine.records import RoundRecord
from pipelines.machine.state import RunState
from pipelines.sleep.plan import RoundPlan


@dataclass(frozen=True)
class StartService:
    """End the experience service, if there is one, and start one. -> ServiceReady."""

    attempt: int


@dataclass(frozen=True)
class StoreBase:
    """Have the base mixture stored. -> BaseStored."""

    attempt: int


@dataclass(frozen=True)
class StoreDreams:
    """Have a release's dreams stored; doing it again changes nothing. -> DreamsStored."""

    attempt: int
    release: int


@dataclass(frozen=True)
class PrepareBase:
    """Make sure that release 0 is there. -> BaseReady."""

    attempt: int


@dataclass(frozen=True)
class ScoreBase:
    """Measure release 0. -> BaseScored."""

    attempt: int


@dataclass(frozen=True)
class WarmPool:
    """Start the pool's ranks, so that the first round need not wait for them. -> PoolReady."""

    attempt: int


@dataclass(frozen=True)
class ReleasePool:
    """End the pool's ranks and give their place back."""


@dataclass(frozen=True)
class StartLearner:
    """End the learner, if there is one, and start one at its newest checkpoint. -> LearnerReady."""

    attempt: int


@dataclass(frozen=True)
class Advance:
    """Let the learner go on. -> Advanced."""

    attempt: int
    steps: int
    until: Optional[int]
    """Stream position to wait at, in tokens; None: nowhere."""


@dataclass(frozen=True)
class Finish:
    """The stream has ended: pin what came since the last mark. -> Advanced."""

    attempt: int


@dataclass(frozen=True)
class Adopt:
    """Tell the learner of a release. -> Advanced."""

    attempt: int
    release: int
    not_before: int
    """Stream position that the adoption must not come before."""
    at_once: bool = False
    """Wait for no boundary."""


@dataclass(frozen=True)
class StopLearner:
    """Ask the learner to finish its step and checkpoint. -> Advanced for every call in flight, StopDeadline later."""

    attempt: int


@dataclass(frozen=True)
class ReleaseLearner:
    """The stream is through: end the learner."""


@dataclass(frozen=True)
class StartRound:
    """Train and judge a candidate. -> RoundJudged or RoundFailed."""

    attempt: int
    plan: RoundPlan
    seen: Tuple[str, ...]
    """Sources that the gate counts."""
    best: Dict[str, float] = field(default_factory=dict)
    """Best bits per byte so far by source, of every source that is probed."""
    retry: bool = False


@dataclass(frozen=True)
class AbandonPool:
    """Give up what the pool is doing."""

    attempt: int


@dataclass(frozen=True)
class Publish:
    """Make the candidate of an attempt the release that its record names. -> Published or PublishFailed."""

    attempt: int
    record: RoundRecord


@dataclass(frozen=True)
class Discard:
    """Remove a rejected candidate."""

    attempt: int
    release: int
    """Number that it would have had."""


@dataclass(frozen=True)
class AuditEntry:
    """An entry of the audit log, before it is chained."""

    kind: str
    body: Dict[str, Any]


@dataclass(frozen=True)
class Commit:
    """Save the state as it was at this point together with audit entries, in one write; then write those to the log."""

    state: RunState
    entries: Tuple[AuditEntry, ...] = ()


@dataclass(frozen=True)
class Record:
    """A line for the journal, and for the tracker what it takes of it."""

    kind: str
    fields: Dict[str, Any]


@dataclass(frozen=True)
class TrackRound:
    """Tell the tracker of a decided round."""

    record: RoundRecord


@dataclass(frozen=True)
class TrackRelease:
    """Tell the tracker of a live release that no round made; it may have been away when it went live."""

    release: int


@dataclass(frozen=True)
class Unpin:
    """Remove fast weights that marks up to a stream position pinned, unless a waiting round reads them."""

    tokens: int
    keep: Tuple[str, ...] = ()
    """Files that waiting rounds read."""


@dataclass(frozen=True)
class TrainControls:
    """Train the controls that have no rows yet. -> ControlTrained for each, then ControlDone."""

    attempt: int
    flops_per_token: float
    """What the run has spent, wake and sleep together."""
    tokens: int
    """Of the stream."""


@dataclass(frozen=True)
class BuildSummary:
    """Put the run into figures. -> SummaryBuilt."""


@dataclass(frozen=True)
class GiveUp:
    """The run cannot go on by itself."""

    part: str
    message: str
    users: bool
    """The part's own error says it better than the message."""


@dataclass(frozen=True)
class End:
    """Nothing is left to do: finished, or stopped."""

    kind: str


Action = Union[
    StartService,
    StoreBase,
    StoreDreams,
    PrepareBase,
    ScoreBase,
    WarmPool,
    ReleasePool,
    StartLearner,
    Advance,
    Finish,
    Adopt,
    StopLearner,
    ReleaseLearner,
    StartRound,
    AbandonPool,
    Publish,
    Discard,
    Commit,
    Record,
    TrackRound,
    TrackRelease,
    Unpin,
    TrainControls,
    BuildSummary,
    GiveUp,
    End,
]
