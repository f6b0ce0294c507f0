"""The logic of a run as a pure state machine: events in, actions out; no clock, no file, no actor, no random number.

`Machine.handle` says what a driver does next. `Simulation` drives it in simulated time, with toy parts (tests) or
with `LocalParts`, which train for real in one process; `cluster/driver` drives it with Ray.
"""

from typing import TYPE_CHECKING

from nl_model.lazy import face

if TYPE_CHECKING:
    from pipelines.machine.faults import Faults
    from pipelines.machine.local import LocalParts
    from pipelines.machine.machine import Machine
    from pipelines.machine.records import RoundRecord
    from pipelines.machine.rules import Rules
    from pipelines.machine.simulated import Simulation, Speeds
    from pipelines.machine.state import Phase, RunState

__all__ = [
    "Faults",
    "LocalParts",
    "Machine",
    "Phase",
    "RoundRecord",
    "Rules",
    "RunState",
    "Simulation",
    "Speeds",
]
__getattr__ = face(
    __name__,
    {
        "Faults": "faults",
        "LocalParts": "local",
        "Machine": "machine",
        "Phase": "state",
        "RoundRecord": "records",
        "Rules": "rules",
        "RunState": "state",
        "Simulation": "simulated",
        "Speeds": "simulated",
    },
)
