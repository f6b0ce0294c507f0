"""Methods by name, and methods with settings changed: `circadian:bank=0.3:lr=2e-3` changes two."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any, Dict, Iterator, Optional, Union

from pipelines.compare.config import METHODS, Method, Night

CHANGE = ":"
"""Stands before every change."""


def names(given: str) -> Iterator[str]:
    """Method names out of a comma-separated list; `all` stands for all, a trailing * for a family of names.

    Raises:
        ValueError: a method or a setting is unknown, or a value is out of bounds.
    """
    for part in given.split(","):
        if part == "all":
            yield from METHODS
        elif part.endswith("*") and not is_changed(part):
            yield from (name for name in METHODS if name.startswith(part[:-1]))
        else:
            method_of(part)
            yield part


def is_changed(name: str) -> bool:
    """Whether a name changes settings of a method."""
    return CHANGE in name


def head_of(name: str) -> str:
    """The method that a name begins with."""
    return name.split(CHANGE, maxsplit=1)[0]


def lr_of(name: str) -> Optional[float]:
    """The step size that a name sets, if it does."""
    lr = _changes(name).get("lr")
    return None if lr is None else _number(name, lr)


def method_of(name: str, tuned: Optional[Method] = None) -> Method:
    """The method of this name, with its changes: fields of `Night` for Circadian's own family, else of `Method`.

    Args:
        tuned: what is changed, where tuning has chosen a variant of the method.

    Raises:
        ValueError: the method or a setting is unknown, a value is not of its type or out of bounds, or a setting would
            have no effect.
    """
    head = head_of(name)
    if head not in METHODS:
        families = "; settings change one method, not a family" if is_changed(name) else ""
        raise ValueError(f"--methods: {head!r} is unknown; use all, or some of {', '.join(METHODS)}{families}")
    method, changes = tuned or METHODS[head], _changes(name)
    if "lr" in changes and not _number(name, changes.pop("lr")) > 0:
        raise ValueError(f"--methods: {name!r} sets lr to no positive number")
    settings: Union[Method, Night] = method.night if method.family == "circadian" else method
    known = {key: value for key, value in asdict(settings).items() if key not in ("family", "night")}
    if unknown := [key for key in changes if key not in known]:
        raise ValueError(f"--methods: {name!r}: {unknown[0]!r} is unknown; use lr, or one of {', '.join(known)}")
    typed = {key: _typed(name, key, value, known[key]) for key, value in changes.items()}
    try:
        changed = replace(settings, **typed)
    except ValueError as error:
        raise ValueError(f"--methods: {name!r}: {error}") from None
    idle = changed.idle()
    if unused := [key for key in typed if key in idle]:
        raise ValueError(
            f"--methods: {name!r}: {unused[0]} has no effect with {idle[unused[0]]}; leave it out, or change that too"
        )
    return replace(method, night=changed) if isinstance(changed, Night) else changed


def _changes(name: str) -> Dict[str, str]:
    found: Dict[str, str] = {}
    for change in name.split(CHANGE)[1:]:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--methods: {change!r} in {name!r} is no change; write KEY=VALUE")
        if key in found:
            raise ValueError(f"--methods: {name!r} sets {key!r} twice")
        found[key] = value
    return found


def _typed(name: str, key: str, value: str, present: Any) -> Any:
    """A value of the type that the setting has."""
    if isinstance(present, bool):
        if value not in ("true", "false"):
            raise ValueError(f"--methods: {name!r}: {key}={value!r} must be true or false")
        return value == "true"
    if isinstance(present, str):
        return value
    number = _number(name, value)
    if isinstance(present, int) and number != int(number):
        raise ValueError(f"--methods: {name!r}: {key}={value!r} must be a whole number")
    return type(present)(number)


def _number(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"--methods: {value!r} in {name!r} is no number") from None
    if not math.isfinite(number):
        raise ValueError(f"--methods: {value!r} in {name!r} is no finite number")
    return number
