"""Looks for the report: the served model beside the release alone, at places along the stream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.report.events import Event, Timeline

MOST = 24
"""Lines of the table; of more looks, evenly many are shown."""


@dataclass(frozen=True)
class LookPoint:
    """A look, as a mean over the sources seen so far, in bits per byte."""

    tokens: int
    """Stream position."""
    release: int
    sources: int
    """How many of them are in the means."""
    served: float
    """The release with the fast levels as they stand."""
    rested: float
    """The release alone."""


def look_points(looks: list[Event]) -> list[LookPoint]:
    """Looks of a journal in stream order; sources that one of the two models has no finite score of are left out."""
    points = []
    for look in looks:
        served, rested = look.get("served") or {}, look.get("rested") or {}
        known = [name for name in served if served[name] is not None and rested.get(name) is not None]
        if known:
            means = [float(np.mean([scores[name] for name in known])) for scores in (served, rested)]
            points.append(LookPoint(int(look["tokens"]), int(look.get("release") or 0), len(known), *means))
    return points


def look_rows(timeline: Timeline) -> list[dict[str, str]]:
    """Rows of the table, texts ready to show."""
    points = look_points(timeline.looks)
    chosen = sorted({round(i) for i in np.linspace(0, len(points) - 1, min(MOST, len(points)))})
    return [
        {
            "tokens": f"{point.tokens:,}",
            "release": str(point.release),
            "sources": str(point.sources),
            "served": f"{point.served:.3f}",
            "rested": f"{point.rested:.3f}",
            "change": f"{point.served - point.rested:+.3f}",
        }
        for point in (points[i] for i in chosen)
    ]
