"""The pictures of a comparison: learning against forgetting, loss along the stream, matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List, Mapping

import numpy as np
from matplotlib.figure import Figure

from pipelines.compare.names import CHANGE
from pipelines.report.plots import COLOURS, DASHES, INK, save

COLUMNS = 4


def write_figures(outcome: Mapping[str, Any], path: Path) -> List[Path]:
    """Draw everything beside the JSON at `path`; returns the PNG paths."""
    stem, written = path.with_suffix(""), []
    for kind, draw in (("pareto", pareto), ("online", online), ("matrix", matrices)):
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


def online(found: Mapping[str, Any], regime: str) -> Figure:
    """Loss before learning along the stream, mean over trials of the first order."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    for i, (name, trials) in enumerate(found["trials"].items()):
        same = [t["curve"] for t in trials if t["order"] == trials[0]["order"] and t["curve"]]
        if not same:
            continue
        x = [point[0] for point in same[0]]
        y = np.mean([[point[1] for point in curve] for curve in same if len(curve) == len(x)], axis=0)
        style = DASHES[i // len(COLOURS) % len(DASHES)]
        axes.plot(x, y, style, color=COLOURS[i % len(COLOURS)], label=name, lw=2.2 if name == "circadian" else 1.1)
    axes.set_xlabel("tokens of the stream")
    axes.set_ylabel("bits per byte, before learning")
    recalled = " (circadian with recall)" if found.get("recalled_bpb") else ""
    axes.set_title(f"Online loss, as each method reads{recalled}, {regime}", loc="left")
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3)
    return figure


def matrices(found: Mapping[str, Any], regime: str) -> Figure:
    """R[k][i] of every method, mean over the seeds of its first order."""
    names = list(found["trials"])
    rows = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(3.2 * COLUMNS, 2.6 * rows), layout="constrained")
    grid = np.atleast_2d(figure.subplots(rows, COLUMNS, squeeze=False))
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, name in zip(grid.flat, names, strict=False):
        trials = [t for t in found["trials"][name] if t["order"] == found["trials"][name][0]["order"]]
        mean = np.mean([t["matrix"] for t in trials], axis=0)
        axes.set_axis_on()
        axes.imshow(mean, cmap="viridis", vmin=2, vmax=7, aspect="auto")
        axes.set_xticks(range(mean.shape[1]), trials[0]["sources"], fontsize=6, rotation=30)
        axes.set_yticks(range(mean.shape[0]), range(mean.shape[0]), fontsize=6)
        axes.set_title(name.replace(CHANGE, f"\n{CHANGE}"), fontsize=9)
        for (k, i), value in np.ndenumerate(mean):
            axes.text(i, k, f"{value:.2f}", ha="center", va="center", fontsize=6, color="white")
    figure.suptitle(f"Bits per byte on each source (columns) after each source (rows), {regime}", fontsize=10)
    return figure
