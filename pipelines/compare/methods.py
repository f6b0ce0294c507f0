"""Methods by name: a strategy, keys that it changes, and what a hook adds; `replay:lr=2e-3:balance=1` changes two more.

Shipped strategies are methods of their own names. Everything that a method is lies in the configuration of a run, or in
a hook's file.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Dict, Iterator, List, Optional, Tuple

from pipelines.compare.opponents import build_hook
from pipelines.config.load import strategies
from pipelines.wake.hooks import Hook

CHANGE = ":"
"""Stands before every change."""
HOOK = "hook."
"""How the settings of a hook begin."""
STEP = "sleep.optimizer.lr"
"""Step size of whoever trains all levels: what tuning looks for."""
ALIASES: Dict[str, str] = {
    "lr": STEP,
    "replay": "wake.replay",
    "batch": "sleep.batch",
    "balance": "sleep.balance",
    "average": "sleep.average",
    "carry": "sleep.carry",
    "schedule": "sleep.schedule",
    "recent": "sleep.recent",
    "teacher": "sleep.teacher",
    "anchor": "sleep.anchor",
    "merge": "sleep.merge",
    "decay": "wake.decay",
    "dreams": "dreams.share",
}
"""Short names of configuration keys."""
Changes = Tuple[Tuple[str, str], ...]
"""(configuration key, value) pairs; later ones win."""


@dataclass(frozen=True)
class Method:
    """One way to learn the stream."""

    strategy: str
    """pipelines/config/strategies."""
    changes: Changes = ()
    """Keys that differ from the strategy's."""
    hook: str = "none"
    """What is added to the learner's training (pipelines/compare/opponents)."""
    settings: Changes = ()
    """Its settings."""
    joint: bool = False
    """All text is there at once: no stream is read, and nothing has to be remembered."""
    step_of: str = ""
    """The method whose tuned step size this one takes; empty: it is tuned itself."""

    def overrides(self) -> List[str]:
        """What to lay over a configuration."""
        return [f"strategy={self.strategy}", *(f"{key}={value}" for key, value in self.changes)]

    def build_hook(self) -> Hook:
        """A hook as set, new."""
        return build_hook(self.hook, dict(self.settings))


def _replaying(share: str, *changes: Tuple[str, str], hook: str = "none") -> Method:
    return Method("replay", (("wake.replay", share), *changes), hook)


METHODS: Dict[str, Method] = {
    **{name: Method(name) for name in strategies()},
    # An ablation changes one thing: it keeps the step size of what it changes.
    **{n: Method(n, step_of="circadian") for n in strategies() if n.startswith(("no_", "cold_", "guided", "dreaming"))},
    "joint": Method("replay", joint=True),
    "replay_5": _replaying("0.05"),
    "replay_25": _replaying("0.25"),
    "replay_50": _replaying("0.5"),
    "replay_80": _replaying("0.8"),
    "replay_unbalanced": _replaying("0.65", ("sleep.balance", "0")),
    "replay_raw": _replaying("0.65", ("sleep.average", "0")),
    "naive_raw": Method("naive", (("sleep.average", "0"),)),
    "der": _replaying("0.5", hook="der"),
    "mer": _replaying("0.5", hook="mer"),
    "ewc": Method("naive", hook="ewc"),
    "lwf": Method("naive", hook="lwf"),
    "lora": Method("naive", hook="lora"),
}
"""The methods by name."""


def names(given: str) -> Iterator[str]:
    """Method names out of a comma-separated list; `all` stands for all, a trailing * for a family of names.

    Raises:
        ValueError: a method is unknown, or a change has not the form key=value.
    """
    for part in given.split(","):
        if part == "all":
            yield from METHODS
        elif part.endswith("*") and not is_changed(part):
            family = [name for name in METHODS if name.startswith(part[:-1])]
            if not family:
                raise ValueError(f"--methods: {part!r} is the beginning of no name; use some of {', '.join(METHODS)}")
            yield from family
        else:
            method_of(part)
            yield part


def is_changed(name: str) -> bool:
    """Whether a name changes settings of a method."""
    return CHANGE in name


def head_of(name: str) -> str:
    """The method that a name begins with."""
    return name.split(CHANGE, maxsplit=1)[0]


def lends_step(name: str) -> str:
    """The method whose step size a name takes unless it sets its own."""
    head = head_of(name)
    return METHODS[head].step_of or head


def lr_of(name: str) -> Optional[float]:
    """The step size that a method sets, if it does."""
    found = dict(method_of(name).changes).get(STEP)
    return None if found is None else float(found)


def method_of(name: str) -> Method:
    """The method of this name, with its changes: keys of the configuration, or `hook.` and a setting of its hook.

    Keys and values are checked where the configuration is loaded.

    Raises:
        ValueError: the method is unknown, a change is none or comes twice, or a hook's setting is unknown.
    """
    head = head_of(name)
    if head not in METHODS:
        near = difflib.get_close_matches(head, METHODS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"--methods: {head!r} is unknown; {hint}use all, or some of {', '.join(METHODS)}")
    method, changes = METHODS[head], _changes(name)
    ours = tuple((key.removeprefix(HOOK), value) for key, value in changes if key.startswith(HOOK))
    keys = tuple((ALIASES.get(key, key), value) for key, value in changes if not key.startswith(HOOK))
    if STEP in dict(keys):
        _check_step(name, dict(keys)[STEP])
    found = replace(method, changes=method.changes + keys, settings=method.settings + ours)
    try:
        found.build_hook()
    except ValueError as error:
        raise ValueError(f"--methods: {name!r}: {error}") from None
    return found


def _check_step(name: str, value: str) -> None:
    try:
        fine = float(value) > 0
    except ValueError:
        fine = False
    if not fine:
        raise ValueError(f"--methods: {name!r} sets lr to {value!r}, which is no positive number")


def _changes(name: str) -> Changes:
    found: Dict[str, str] = {}
    for change in name.split(CHANGE)[1:]:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise ValueError(f"--methods: {change!r} in {name!r} is no change; write KEY=VALUE")
        if key in found:
            raise ValueError(f"--methods: {name!r} sets {key!r} twice")
        found[key] = value
    return tuple(found.items())
