"""Bounds of single settings, said in the same words everywhere."""

from __future__ import annotations


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """ValueError unless a setting is one of the allowed names."""
    if value not in allowed:
        raise ValueError(f"{key}={value!r} is unknown; use one of {', '.join(allowed)}")


def at_least(key: str, value: float, bound: float) -> None:
    """ValueError unless a setting is a number of at least `bound`."""
    if not value >= bound:
        raise ValueError(f"{key}={value} must be at least {bound}")


def share(key: str, value: float) -> None:
    """ValueError unless a setting lies between 0 and 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{key}={value} must lie between 0 and 1")


def inside(key: str, value: float, low: float, high: float) -> None:
    """ValueError unless a setting lies between two bounds, neither included."""
    if not low < value < high:
        raise ValueError(f"{key}={value} must lie between {low} and {high}, both excluded")
