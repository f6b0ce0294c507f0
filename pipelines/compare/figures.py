"""The pictures of a comparison: learning against forgetting, the served model and the online loss along the stream,
matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List, Mapping

import numpy as np
from matplotlib.figure import Figure

from pipelines.compare.methods import CHANGE
from pipelines.report.plots import COLOURS, DASHES, INK, save

COLUMNS = 4


def write_figures(outcome: Mapping[str, Any], path: Path) -> List[Path]:
    """Draw everything beside the JSON at `path`; returns the PNG paths."""
    stem, written = path.with_suffix(""), []
    for kind, draw in (("pareto", pareto), ("anytime", anytime), ("online", online), ("matrix", matrices)):
        for regime, found in outcome["regimes"].items():
            written.append(save(draw(found, regime), stem.with_name(f"{stem.name}-{regime}-{kind}.png")))
    return written


def pareto(found: Mapping[str, Any], regime: str) -> Figure:
    """Learning against forgetting, one point per method; down and left is better."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(found["learning"]):
        ours = name.startswith("circadian")
        x, y = found["learning"][name], found["forgetting"][name]
        axes.scatter(x, y, s=90 if ours else 40, color=COLOURS[i % len(COLOURS)], marker="*" if ours else "o", zorder=3)
        axes.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8, color=INK)
    axes.set_xlabel("learning: bits per byte on a source just learned")
    axes.set_ylabel("forgetting: bits per byte lost since")
    axes.set_title(f"Learning against forgetting ({regime})", loc="left")
    axes.grid(alpha=0.3)
    return figure


def anytime(found: Mapping[str, Any], regime: str) -> Figure:
    """The served model along the stream, over the sources seen so far."""
    return _along(found, "looks", "bits per byte over the sources seen", f"The served model along the stream, {regime}")


def online(found: Mapping[str, Any], regime: str) -> Figure:
    """Loss before learning along the stream, weights alone."""
    return _along(found, "curve", "bits per byte, before learning", f"Online loss of the weights alone, {regime}")


def _along(found: Mapping[str, Any], key: str, label: str, title: str) -> Figure:
    """A series of (tokens, value, ...) of every method, mean over trials of the first order."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    for i, (name, trials) in enumerate(found["trials"].items()):
        same = [t[key] for t in trials if t["order"] == trials[0]["order"] and t[key]]
        if not same:
            continue
        x = [point[0] for point in same[0]]
        y = np.mean([[point[1] for point in points] for points in same if len(points) == len(x)], axis=0)
        style = DASHES[i // len(COLOURS) % len(DASHES)]
        axes.plot(x, y, style, color=COLOURS[i % len(COLOURS)], label=name, lw=2.2 if name == "circadian" else 1.1)
    axes.set_xlabel("tokens of the stream")
    axes.set_ylabel(label)
    axes.set_title(title, loc="left")
    if axes.lines:
        axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3)
    return figure


def matrices(found: Mapping[str, Any], regime: str) -> Figure:
    """R[k][i] of every method that releases, mean over the seeds of its first order."""
    names = [name for name, trials in found["trials"].items() if trials[0]["matrix"]]
    rows = max(1, -(-len(names) // COLUMNS))
    figure = Figure(figsize=(3.2 * COLUMNS, 2.6 * rows), layout="constrained")
    grid = np.atleast_2d(figure.subplots(rows, COLUMNS, squeeze=False))
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, name in zip(grid.flat, names, strict=False):
        trials = [t for t in found["trials"][name] if t["order"] == found["trials"][name][0]["order"]]
        first = np.array(trials[0]["matrix"])
        # Rejections differ by seed: a mean is taken over those with as many releases.
        mean = np.mean([t["matrix"] for t in trials if np.shape(t["matrix"]) == first.shape], axis=0)
        axes.set_axis_on()
        axes.imshow(mean, cmap="viridis", vmin=2, vmax=7, aspect="auto")
        axes.set_xticks(range(mean.shape[1]), trials[0]["sources"], fontsize=6, rotation=30)
        axes.set_yticks(range(mean.shape[0]), range(mean.shape[0]), fontsize=6)
        axes.set_title(name.replace(CHANGE, f"\n{CHANGE}"), fontsize=9)
        for (k, i), value in np.ndenumerate(mean):
            axes.text(i, k, f"{value:.2f}", ha="center", va="center", fontsize=6, color="white")
    figure.suptitle(f"Bits per byte on each source (columns) of each release (rows), {regime}", fontsize=10)
    return figure
