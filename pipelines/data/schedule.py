"""Which source the sequence with a given key comes from: pure functions of (key, seed, sizes, what is left).

`totals` holds each source's size in sequences, as estimated at the start; `alive` says which have something left (at
least one has). Both are in stream order, and so is the index returned.
"""

from __future__ import annotations

from typing import Callable, Dict, Sequence

_MASK = (1 << 64) - 1

Schedule = Callable[[int, int, Sequence[float], Sequence[bool], float], int]


def uniform(seed: int, key: int) -> float:
    """A number in [0, 1) that depends on (seed, key) alone: splitmix64 over both."""
    value = _mix(_mix(seed & _MASK) ^ (key & _MASK))
    return (value >> 11) / (1 << 53)


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sequential(key: int, seed: int, totals: Sequence[float], alive: Sequence[bool], width: float) -> int:
    """The first source that has something left."""
    return alive.index(True)


def mixed(key: int, seed: int, totals: Sequence[float], alive: Sequence[bool], width: float) -> int:
    """A source drawn in proportion to its size at the start, among those that have something left."""
    weights = [total if left else 0.0 for total, left in zip(totals, alive, strict=True)]
    return _at(uniform(seed, key) * sum(weights), weights, alive)


def soft(key: int, seed: int, totals: Sequence[float], alive: Sequence[bool], width: float) -> int:
    """Sequential with blurred boundaries: over `width` sequences the odds move linearly from a source to the next."""
    end = 0.0
    for index, total in enumerate(totals):
        end += total
        if alive[index] and end + width / 2 <= key:
            # The draws, or the estimate, left some of it: that comes before the stream moves on.
            return index
    place = key + 0.5 + (uniform(seed, key) - 0.5) * width
    return _at(place, totals, alive)


def _at(place: float, sizes: Sequence[float], alive: Sequence[bool]) -> int:
    """The stretch that `place` falls into when stretches of `sizes` lie end to end; the nearest one still alive."""
    chosen = 0
    for index, size in enumerate(sizes):
        chosen = index
        place -= size
        if place < 0:
            break
    # Earlier ones first: in a sequence of sources, leftovers of the past come before the future.
    return min((i for i, left in enumerate(alive) if left), key=lambda i: (abs(i - chosen), i))


SCHEDULES: Dict[str, Schedule] = {"sequential": sequential, "mixed": mixed, "soft": soft}
