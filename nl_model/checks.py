"""Bounds of single settings, said in the same words everywhere; whoever wants to know them can listen."""

from __future__ import annotations

import contextlib
import math
from typing import Dict, Iterator, List

_listeners: List[Dict[str, str]] = []


@contextlib.contextmanager
def listening() -> Iterator[Dict[str, str]]:
    """Bounds by key of every setting that is checked inside the block, as `must` would name them."""
    found: Dict[str, str] = {}
    _listeners.append(found)
    try:
        yield found
    finally:
        _listeners.remove(found)


def must(key: str, value: object, holds: bool, bound: str) -> None:
    """ValueError unless a setting holds its bound: "{key}={value} must {bound}"."""
    for found in _listeners:
        found[key] = bound
    if not holds:
        raise ValueError(f"{key}={value} must {bound}")


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """ValueError unless a setting is one of the allowed names."""
    for found in _listeners:
        found[key] = f"be one of {', '.join(allowed)}"
    if value not in allowed:
        raise ValueError(f"{key}={value!r} is unknown; use one of {', '.join(allowed)}")


def at_least(key: str, value: float, bound: float, endless: bool = False) -> None:
    """ValueError unless a setting is a number of at least `bound`.

    Args:
        endless: .inf is one, too, and means that there is no bound.
    """
    last = ", or .inf" if endless else ", and finite" if not -math.inf < value < math.inf else ""
    must(key, value, value >= bound and (endless or value < math.inf), f"be at least {bound}{last}")


def above(key: str, value: float, bound: float) -> None:
    """ValueError unless a setting is a finite number above `bound`."""
    last = "" if -math.inf < value < math.inf else ", and finite"
    must(key, value, bound < value < math.inf, f"be above {bound}{last}")


def share(key: str, value: float) -> None:
    """ValueError unless a setting lies between 0 and 1."""
    must(key, value, 0 <= value <= 1, "lie between 0 and 1")


def inside(key: str, value: float, low: float, high: float) -> None:
    """ValueError unless a setting lies between two bounds, neither included."""
    must(key, value, low < value < high, f"lie between {low} and {high}, both excluded")


def within(key: str, value: float, low: float, high: float, ends: str = "[]") -> None:
    """ValueError unless a setting lies between two bounds; a square bracket in `ends` includes one of them."""
    holds = low <= value <= high and (ends[0] == "[" or value > low) and (ends[1] == "]" or value < high)
    must(key, value, holds, f"lie in {ends[0]}{low}, {high}{ends[1]}")
