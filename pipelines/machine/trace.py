"""Traces: what a driver told the machine and what it was told to do, a JSON line for each event; and their proof.

A machine is a function of state, rules and events. So a trace can be checked afterwards: a fresh machine that hears the
same events must say the same actions. Then what the schedules of the simulated driver show of the machine holds for it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import UnionType
from typing import IO, Any, Dict, List, Mapping, Optional, Sequence, Union, get_args, get_origin, get_type_hints

from pipelines.machine import events
from pipelines.machine.actions import Action, Commit
from pipelines.machine.events import Event
from pipelines.machine.machine import Machine
from pipelines.machine.rules import Rules
from pipelines.machine.state import RunState

FILE = "checkpoints/trace.jsonl"
DRIVERS = ("audit", "seconds")
"""Fields of the state that the driver keeps: no function of the events."""


class Trace:
    """Writes a trace. A run that is continued appends to it: a new head, then its events.

    Args:
        machine: one that has not heard anything yet.
    """

    def __init__(self, path: Path, machine: Machine) -> None:
        self.file: IO[str] = open(path, "a")  # noqa: SIM115 (closed with the process)
        self.file.write("\n")  # a crash may have cut the last line
        self._write({"state": machine.state.to_json(), "rules": asdict(machine.rules)})

    def add(self, event: Event, actions: Sequence[Action]) -> None:
        """One event and what it led to."""
        self._write({"event": to_plain(event), "actions": [describe(action) for action in actions]})

    def _write(self, line: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


def check_trace(path: Path) -> List[str]:
    """What in a trace the machine does not allow; empty where every list of actions is the machine's own."""
    machine: Optional[Machine] = None
    wrong: List[str] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entry = json.loads(line) if line else {}
        except ValueError:  # cut by a crash; what follows begins with a head again
            entry = {}
        if "state" in entry:
            machine = Machine(RunState.from_json(entry["state"]), from_plain(Rules, entry["rules"]))
        elif machine is not None and entry:
            done, allowed = entry["actions"], machine.handle(event_of(entry["event"]))
            if not is_allowed(done, allowed):
                wrong.append(f"line {number}: {_names(done)} where the machine says {_names(map(describe, allowed))}")
                machine = None
    return wrong


def is_allowed(done: Sequence[Mapping[str, Any]], allowed: Sequence[Action]) -> bool:
    """Whether described actions are what the machine says, in its order."""
    return list(done) == [describe(action) for action in allowed]


def to_plain(event: Event) -> Dict[str, Any]:
    """An event as a JSON-able mapping."""
    return {"kind": type(event).__name__, **asdict(event)}


def event_of(plain: Mapping[str, Any]) -> Event:
    """The event that `to_plain` gave."""
    kind = getattr(events, plain["kind"])
    event: Event = from_plain(kind, {name: value for name, value in plain.items() if name != "kind"})
    return event


def describe(action: Action) -> Dict[str, Any]:
    """An action as JSON has it. Of a saved state its digest: the events say how it came about."""
    plain: Dict[str, Any] = {"kind": type(action).__name__}
    if isinstance(action, Commit):
        state = {name: value for name, value in action.state.to_json().items() if name not in DRIVERS}
        plain["state"] = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]
        plain["entries"] = [asdict(entry) for entry in action.entries]
    else:
        plain.update(asdict(action))
    described: Dict[str, Any] = json.loads(json.dumps(plain))
    return described


def from_plain(kind: Any, plain: Any) -> Any:
    """A value of a type out of what JSON made of it: frozen dataclasses, enums, tuples, and plain JSON."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        (inner,) = [one for one in arguments if one is not type(None)]
        return None if plain is None else from_plain(inner, plain)
    if origin is tuple:
        inner = [arguments[0]] * len(plain) if arguments[-1] is Ellipsis else arguments
        return tuple(from_plain(one, value) for one, value in zip(inner, plain, strict=True))
    if origin is list:
        return [from_plain(arguments[0], value) for value in plain]
    if origin is dict:
        return {name: from_plain(arguments[1], value) for name, value in plain.items()}
    if isinstance(kind, type) and is_dataclass(kind):
        hints = _hints(kind)
        known = {field.name for field in fields(kind)}
        return kind(**{name: from_plain(hints[name], value) for name, value in plain.items() if name in known})
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(plain)
    return plain


@cache
def _hints(kind: type) -> Dict[str, Any]:
    return get_type_hints(kind)


def _names(actions: Any) -> str:
    return ", ".join(action["kind"] for action in actions) or "nothing"
