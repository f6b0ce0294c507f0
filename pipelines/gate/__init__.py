"""The gate: held-out measurement, what it sees of a candidate, its checks, its decision.

Checks are pure functions of `Evidence`. To add one: a function in `decision.py` and a line in its list.
"""

from typing import TYPE_CHECKING

from nl_model.lazy import face

if TYPE_CHECKING:
    from pipelines.gate.decision import Decision, decide
    from pipelines.gate.evidence import Evidence
    from pipelines.gate.judge import Judge, Verdict
    from pipelines.gate.probe import measure, score, split_probe

__all__ = [
    "Decision",
    "Evidence",
    "Judge",
    "Verdict",
    "decide",
    "measure",
    "score",
    "split_probe",
]
__getattr__ = face(
    __name__,
    {
        "Decision": "decision",
        "Evidence": "evidence",
        "Judge": "judge",
        "Verdict": "judge",
        "decide": "decision",
        "measure": "probe",
        "score": "probe",
        "split_probe": "probe",
    },
)
