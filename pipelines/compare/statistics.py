"""Figures of a comparison: means, paired bootstrap intervals, shares of the gap to joint training. Pure functions."""

from __future__ import annotations

from typing import Dict, List, Mapping, Sequence, Tuple

import numpy as np

DRAWS = 10_000
"""Bootstrap resamples."""


def interval(values: Sequence[float], seed: int = 0) -> Tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of values over trials (paired ones: give differences)."""
    found = np.asarray(values, dtype=np.float64)
    if len(found) < 2:
        return float(found.mean()), float(found.mean())
    draws = np.random.default_rng(seed).integers(len(found), size=(DRAWS, len(found)))
    low, high = np.percentile(found[draws].mean(1), [2.5, 97.5])
    return float(low), float(high)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Dict[str, float]:
    """Mean of ours - theirs over trials that share seed and order, with its 95 % interval; negative: ours is lower."""
    assert len(ours) == len(theirs)
    difference = [a - b for a, b in zip(ours, theirs, strict=True)]
    low, high = interval(difference)
    return {"mean": float(np.mean(difference)), "low": low, "high": high}


def gap_closed(ours: Sequence[float], naive: Sequence[float], joint: Sequence[float]) -> float:
    """Share of the way from naive to joint training that a method goes: 1 is joint."""
    return float((np.mean(naive) - np.mean(ours)) / (np.mean(naive) - np.mean(joint)))


def slope(values: Sequence[float], seed: int = 0) -> Dict[str, float]:
    """Least-squares slope per step of a series, with a 95 % bootstrap interval over its points."""
    y = np.asarray(values, dtype=np.float64)
    x = np.arange(len(y), dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(y), size=(DRAWS, len(y)))
    slopes = [_slope(x[d], y[d]) for d in draws if len(set(d.tolist())) > 1]
    low, high = np.percentile(slopes, [2.5, 97.5])
    return {"slope": _slope(x, y), "low": float(low), "high": float(high)}


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    centred = x - x.mean()
    return float((centred * (y - y.mean())).sum() / (centred**2).sum())


def columns(results: Mapping[str, List[Mapping[str, float]]], key: str) -> Dict[str, List[float]]:
    """One figure of every trial by method; methods of which a trial lacks it are left out."""
    found = {name: [r.get(key) for r in trials] for name, trials in results.items()}
    return {name: list(values) for name, values in found.items() if values and None not in values}  # type: ignore[arg-type]
