"""A grid of step sizes that widens until the best one lies inside it: what to try next, as a pure function.

A best value at the edge of a grid is a bound, not an optimum; whoever reports one has to say so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Mapping, Optional, Sequence

FACTOR = 2.0
"""Between the edge of the grid and the next step size beyond it."""


@dataclass(frozen=True)
class Widening:
    """What is known of a grid so far."""

    next: Optional[float]
    """Step size to try next; None: it is over."""
    best: Optional[float]
    """The best step size so far, by the lowest value; None while there is none, or all of them diverged."""
    edge: str = ""
    """`lowest` or `highest`, where it is over and the best step size is still at that edge of the grid; else empty."""


def widen(grid: Sequence[float], found: Mapping[float, float], most: int) -> Widening:
    """The next step size of a search that begins with a grid and goes on beyond its better edge by a factor.

    Args:
        grid: step sizes to begin with, above 0.
        found: values of those tried so far, lower is better; what diverged has a value that is not finite.
        most: most step sizes to try, those of the grid included.
    """
    if not grid or min(grid) <= 0:
        raise ValueError(f"grid={list(grid)} must hold step sizes above 0")
    values = {rate: value if math.isfinite(value) else math.inf for rate, value in found.items()}
    # Ties go to the smaller step: what diverges everywhere is searched downwards.
    best = min(sorted(values), key=lambda rate: values[rate]) if values else None
    known = best if best is not None and math.isfinite(values[best]) else None
    for rate in grid:
        if rate not in found:
            return Widening(rate, known)
    assert best is not None
    at = [edge for edge, rate in (("lowest", min(values)), ("highest", max(values))) if rate == best]
    if not at:
        return Widening(None, known)
    beyond = best / FACTOR if "lowest" in at else best * FACTOR
    return Widening(None, known, at[0]) if len(values) >= most else Widening(beyond, known)
