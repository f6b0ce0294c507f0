"""Awake: the learner scores, logs, then learns; what it pins and adopts; what it tells.

`Learner` is the phase as one object, without actors and files (`LearnerHost` keeps what must be kept). It writes its
own fast levels, or nothing, or every level (`wake.writes`; then `OnlineTraining` is the pool's training step on the
stream).
"""

from typing import TYPE_CHECKING

from nl_model.lazy import face

if TYPE_CHECKING:
    from pipelines.wake.awake import Awake
    from pipelines.wake.learner import Learner, LearnerHost
    from pipelines.wake.online_training import OnlineTraining
    from pipelines.wake.report import LearnerReport, Look, Mark, StepReport
    from pipelines.wake.trigger import Trigger

__all__ = [
    "Awake",
    "Learner",
    "LearnerHost",
    "LearnerReport",
    "Look",
    "Mark",
    "OnlineTraining",
    "StepReport",
    "Trigger",
]
__getattr__ = face(
    __name__,
    {
        "Awake": "awake",
        "Learner": "learner",
        "LearnerHost": "learner",
        "LearnerReport": "report",
        "Look": "report",
        "Mark": "report",
        "OnlineTraining": "online_training",
        "StepReport": "report",
        "Trigger": "trigger",
    },
)
