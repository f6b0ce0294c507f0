"""Asleep: rounds, and the core of all training.

`training_step` is the only place where a loss, a backward pass and a write meet; an `Engine` says how (in this
process, or over DeepSpeed's ranks), an objective says on what loss, batches are functions of the step. `run_round` is
a round in named stages; a `Host` says where it runs.
"""

from typing import TYPE_CHECKING

from nl_model.lazy import face

if TYPE_CHECKING:
    from pipelines.sleep.average import WeightAverage
    from pipelines.sleep.batches import RoundBatches
    from pipelines.sleep.engine import Engine, LocalEngine
    from pipelines.sleep.objective import GuidedObjective
    from pipelines.sleep.plan import RoundPlan
    from pipelines.sleep.round import Candidate, Host, Pinned, run_round
    from pipelines.sleep.schedule import Schedule
    from pipelines.sleep.training import Batch, train, training_step

__all__ = [
    "Batch",
    "Candidate",
    "Engine",
    "GuidedObjective",
    "Host",
    "LocalEngine",
    "Pinned",
    "RoundBatches",
    "RoundPlan",
    "Schedule",
    "WeightAverage",
    "run_round",
    "train",
    "training_step",
]
__getattr__ = face(
    __name__,
    {
        "Batch": "training",
        "Candidate": "round",
        "Engine": "engine",
        "GuidedObjective": "objective",
        "Host": "round",
        "LocalEngine": "engine",
        "Pinned": "round",
        "RoundBatches": "batches",
        "RoundPlan": "plan",
        "Schedule": "schedule",
        "WeightAverage": "average",
        "run_round": "round",
        "train": "training",
        "training_step": "training",
    },
)
