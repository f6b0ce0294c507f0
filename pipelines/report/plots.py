"""The pictures of a report. Each function turns data into a matplotlib Figure; save() makes it a PNG.

Only the object-oriented interface is used, so nothing here depends on, or changes, the state of pyplot. Series too
short to draw give a figure that says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipelines.data.printable import printable
from pipelines.report.events import Point, RoundSpan, Timeline, describe_round, short_number
from pipelines.report.looks import look_points
from pipelines.report.sides import sides

# Okabe and Ito's colours, which stay apart for colour-blind readers; the yellow is darkened for white paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#B8A800", "#4D4D4D")
DASHES = ("-", "--", ":", "-.")
PROMOTED, REJECTED, RUNNING, QUEUED = "#009E73", "#D55E00", "#56B4E9", "#D9D9D9"
INK, FAINT = "#222222", "#8A8A8A"
WIDTH = 10.0  # inches
MAX_MATRIX_ROWS = 32
MAX_LABELS = 16
MAX_TICKS = 2000


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG at 144 dots per inch and return its path."""
    figure.savefig(path, format="png", dpi=144, facecolor="white", bbox_inches="tight", pad_inches=0.12)
    return path


def write_plots(timeline: Timeline, summary: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Draw everything into folder. Returns PNG paths by name: online_loss, awake, matrix, level_writes, rounds,
    surprise."""
    figures = {
        "awake": awake(timeline),
        "online_loss": online_loss(timeline),
        "matrix": matrix(summary),
        "level_writes": level_writes(timeline),
        "rounds": rounds(timeline),
        "surprise": surprise(timeline),
    }
    return {name: save(figure, folder / f"{name}.png") for name, figure in figures.items()}


def online_loss(timeline: Timeline) -> Figure:
    """Bits per byte by source over the stream, each batch scored before it is learned from; sleeps marked.

    Thin lines below: the same read together with recall.
    """
    figure, axes = _figure("Online loss: every batch scored before it is learned from", height=4.4)
    if not timeline.bpb:
        return _empty(axes, "No wake step yet.")
    _draw_sources(axes, timeline, timeline.bpb)
    _draw_sources(axes, timeline, timeline.recalled, thin=True)
    _mark_sleeps(axes, timeline)
    _stream_axis(axes, timeline)
    axes.set_ylabel("bits per byte" + (" (thin: with recall)" if timeline.recalled else ""))
    _source_legend(axes, timeline, timeline.bpb)
    return figure


def awake(timeline: Timeline) -> Figure:
    """The served model beside the release alone along the stream, each as a mean over the sources seen so far."""
    figure, axes = _figure(
        "What is served, and the release alone: held-out text of all sources seen so far", height=3.6
    )
    points = look_points(timeline.looks)
    if not points:
        return _empty(axes, "No look was taken; report.look_every says how often.")
    x = [point.tokens for point in points]
    served, rested = [point.served for point in points], [point.rested for point in points]
    axes.plot(x, served, color=COLOURS[0], lw=2, marker="o", ms=4, label="served: with the fast levels")
    axes.plot(x, rested, color=COLOURS[1], lw=2, ls="--", marker="s", ms=4, label="the release alone")
    _mark_sleeps(axes, timeline)
    _stream_axis(axes, timeline)
    axes.set_ylabel("bits per byte, mean")
    axes.legend(loc="upper left", bbox_to_anchor=(1.005, 1), frameon=False, fontsize=9)
    return figure


def surprise(timeline: Timeline) -> Figure:
    """Surprise by source, and below it how the distribution over wake steps drifts along the stream."""
    figure = Figure(figsize=(WIDTH, 6.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _style(top, "Surprise by source: loss per token before learning from it")
    _style(bottom, "Drift of the distribution of surprise over wake steps, all sources together")
    if not timeline.surprise:
        _empty(bottom, "")
        return _empty(top, "No wake step yet.")
    _draw_sources(top, timeline, timeline.surprise)
    _source_legend(top, timeline, timeline.surprise)
    _draw_quantiles(bottom, sorted(point for series in timeline.surprise.values() for point in series))
    for axes in (top, bottom):
        _mark_sleeps(axes, timeline, labels=axes is top)
        axes.set_ylabel("nats per token")
    _stream_axis(bottom, timeline)
    return figure


def level_writes(timeline: Timeline) -> Figure:
    """A raster: one row per level from fast to slow, one tick per write. The pool's levels are written by adoptions."""
    names = sorted(timeline.levels, key=lambda name: timeline.levels[name].get("period", 0))
    names += [name for name in timeline.writes if name not in timeline.levels]
    figure, axes = _figure("Writes of each level: the faster, the denser", height=1.3 + 0.62 * max(1, len(names)))
    if not names:
        return _empty(axes, "No level has been written yet.")
    adoptions = [tokens for tokens, _ in timeline.adoptions]
    end = _stream_axis(axes, timeline)
    labels = []
    for row, name in enumerate(names):
        level = timeline.levels.get(name, {})
        asleep = level.get("owner") == "pool"
        writes = sorted({*timeline.writes.get(name, ()), *(adoptions if asleep else ())})
        # Where ticks would lie closer than the paper resolves, one per column stands for all.
        drawn = sorted({round(tokens / end * MAX_TICKS) / MAX_TICKS * end for tokens in writes})
        drawn = drawn if len(writes) > MAX_TICKS else writes
        thickness = min(2.6, max(0.3, 320 / max(1, len(drawn))))
        axes.vlines(drawn, row - 0.36, row + 0.36, colors=COLOURS[row % len(COLOURS)], lw=thickness)
        axes.text(1.01, row, f"{len(writes):,}", transform=axes.get_yaxis_transform(), va="center", color=INK, size=9)
        labels.append(f"{name}\nevery {level.get('period', 0):,} tokens, {'asleep' if asleep else 'awake'}")
    axes.text(1.01, -0.62, "writes", transform=axes.get_yaxis_transform(), va="center", color=FAINT, size=8)
    axes.set_yticks(range(len(names)), labels)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False)
    return figure


def rounds(timeline: Timeline) -> Figure:
    """When each round waited and ran, its decision and gate figures, over the learner's way through the stream."""
    count = len(timeline.rounds)
    figure, axes = _figure("Consolidation rounds, while the learner reads on", height=min(14.0, 2.4 + 0.36 * count))
    if not count:
        return _empty(axes, "No round yet.")
    unit, scale = _time_unit(timeline.seconds)
    end = max(timeline.seconds, 1e-9) / scale
    _draw_position(axes, timeline, scale)
    for row, span in enumerate(timeline.rounds):
        _draw_round(axes, row, span, end, scale)
        if count <= 30:
            _annotate_round(axes, row, span, end, scale)
    axes.set_yticks(range(count), [f"round {span.id}" for span in timeline.rounds])
    if count > 30:
        axes.yaxis.set_major_locator(MaxNLocator(20, integer=True))
    axes.set_ylim(count - 0.4, -0.6)
    axes.set_xlim(0, end * 1.01)
    axes.set_xlabel(f"running time in {unit}" + (" (dotted: resumed; pauses left out)" if timeline.resumes else ""))
    for moment in timeline.resumes:
        axes.axvline(moment / scale, color=FAINT, lw=1, ls=":")
    patches = [Patch(color=QUEUED, label="waiting"), Patch(color=RUNNING, label="no decision")]
    patches += [Patch(color=PROMOTED, label="promoted"), Patch(color=REJECTED, label="rejected")]
    line = Line2D([], [], color=FAINT, label="stream position of the learner (right)")
    _legend_below(axes, [*patches, line])
    return figure


def matrix(summary: Mapping[str, Any]) -> Figure:
    """R of the run and of its controls side by side on one colour scale: held-out bits per byte of each source."""
    sources = [str(source) for source in summary.get("sources") or ()]
    named = sides(summary)
    grids = [_grid(side, len(sources)) for _, side in named]
    finite = np.concatenate([values[np.isfinite(values)] for _, values in grids])
    if not finite.size:
        figure, axes = _figure("R: held-out bits per byte", height=2.4)
        return _empty(axes, "No probe yet.")
    rows = max(len(labels) for labels, _ in grids)
    width = max(WIDTH, 2 + len(named) * (1 + 0.75 * len(sources)))
    figure = Figure(figsize=(width, 2.2 + 0.36 * rows), layout="constrained")
    figure.suptitle("R: bits per byte on held-out text of each source, after each stage (lower is better)", size=12)
    scale = (float(finite.min()), float(max(finite.max(), finite.min() + 1e-6)))
    image: Any = None
    all_axes = figure.subplots(1, len(named), squeeze=False)[0]
    for axes, (title, _), (labels, values) in zip(all_axes, named, grids, strict=True):
        axes.set_title(title, size=11, loc="left", color=INK, weight="bold")
        if labels:
            image = _draw_grid(axes, labels, sources, values, scale)
        else:
            _empty(axes, "not trained")
    figure.colorbar(image, ax=all_axes.tolist(), label="bits per byte", shrink=0.8, pad=0.02)
    return figure


# Parts of the figures.


def _figure(title: str, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    _style(axes, title)
    return figure, axes


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", size=12, color=INK, weight="bold", pad=18)
    axes.grid(visible=True, color="#E6E6E6", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)


def _empty(axes: Axes, message: str) -> Figure:
    axes.text(0.5, 0.5, message, transform=axes.transAxes, ha="center", va="center", color=FAINT, size=12)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return figure


def _stream_axis(axes: Axes, timeline: Timeline) -> float:
    """Label x as stream position. Returns its end in tokens."""
    drawn = [tokens for _, tokens in timeline.positions] + [point[0] for s in timeline.bpb.values() for point in s]
    end = float(max([*drawn, *(tokens for tokens, _ in timeline.adoptions), 1]))
    axes.set_xlim(0, end * 1.005)
    axes.set_xlabel("stream position in tokens")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    return end


def _look(timeline: Timeline, source: str) -> tuple[str, str]:
    index = timeline.sources.index(source)
    return COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]


def _name(text: str) -> str:
    """A name as it is: not as a formula, and in the legend though it begins with an underscore."""
    shown = printable(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _draw_sources(axes: Axes, timeline: Timeline, series: Mapping[str, Sequence[Point]], thin: bool = False) -> None:
    steps = sorted({tokens for points in series.values() for tokens, _ in points})
    stride = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    for source, points in series.items():
        colour, dash = _look(timeline, source)
        x, y = np.array(points, dtype=np.float64).T
        # A source that pauses leaves a gap instead of a line across it.
        for part in np.split(np.arange(len(x)), np.flatnonzero(np.diff(x) > 12 * stride) + 1):
            kept = part[:: max(1, len(part) // MAX_TICKS)] if not thin else part[:0]
            axes.plot(x[kept], y[kept], color=colour, lw=0.7, alpha=0.3, marker="o" if len(part) == 1 else None, ms=3)
            axes.plot(
                x[part],
                smooth(y[part], max(1, len(steps) // 120)),
                color=colour,
                ls=dash,
                lw=1 if thin else 2,
                marker="o" if thin and len(part) == 1 else None,
                ms=2,
            )


def _source_legend(axes: Axes, timeline: Timeline, series: Mapping[str, Any]) -> None:
    lines = []
    for source in [name for name in timeline.sources if name in series][: 3 * MAX_LABELS]:
        colour, dash = _look(timeline, source)
        lines.append(Line2D([], [], color=colour, ls=dash, lw=2, label=_name(source)))
    axes.legend(handles=lines, loc="upper left", bbox_to_anchor=(1.005, 1), frameon=False, fontsize=9)


def _mark_sleeps(axes: Axes, timeline: Timeline, labels: bool = True) -> None:
    for tokens, release in timeline.adoptions:
        axes.axvline(tokens, color=FAINT, lw=1, ls=(0, (4, 3)), zorder=1)
        if labels and len(timeline.adoptions) <= MAX_LABELS:
            place = axes.get_xaxis_transform()
            axes.text(tokens, 1.012, f"release {release}", transform=place, ha="center", color=FAINT, size=8)


def _draw_quantiles(axes: Axes, points: Sequence[Point]) -> None:
    bins = np.array_split(np.array(points, dtype=np.float64), max(1, min(60, len(points) // 10)))
    x = [float(part[:, 0].mean()) for part in bins]
    low, lower, middle, upper, high = np.array([np.quantile(p[:, 1], (0.05, 0.25, 0.5, 0.75, 0.95)) for p in bins]).T
    axes.fill_between(x, low, high, color=COLOURS[0], alpha=0.15, lw=0, label="90 % of steps")
    axes.fill_between(x, lower, upper, color=COLOURS[0], alpha=0.32, lw=0, label="50 % of steps")
    axes.plot(x, middle, color=COLOURS[0], lw=1.8, marker="o" if len(x) == 1 else None, label="median")
    axes.legend(loc="upper left", bbox_to_anchor=(1.005, 1), frameon=False, fontsize=9)


def _draw_position(axes: Axes, timeline: Timeline, scale: float) -> None:
    right = axes.twinx()
    moments, positions = np.array(
        [(0.0, 0), *timeline.positions, (timeline.seconds, max([0, *(p for _, p in timeline.positions)]))],
        dtype=np.float64,
    ).T
    right.plot(moments / scale, positions, color=FAINT, lw=1.6)
    right.fill_between(moments / scale, positions, color="#F3F3F3", lw=0)
    right.set_ylim(0, max(1.0, positions.max(), timeline.stream_tokens) * 1.04)
    right.set_ylabel("stream position in tokens", color=FAINT)
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    right.tick_params(colors=FAINT, labelsize=9)
    right.spines[["top", "left"]].set_visible(False)
    axes.set_zorder(right.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.grid(visible=False)


def _draw_round(axes: Axes, row: int, span: RoundSpan, end: float, scale: float) -> None:
    start = end if span.started is None else span.started / scale
    stop = end if span.finished is None else span.finished / scale
    if span.queued is not None:
        axes.barh(row, start - span.queued / scale, left=span.queued / scale, height=0.5, color=QUEUED)
    colour = {"promoted": PROMOTED, "rejected": REJECTED}.get(span.decision or "", RUNNING)
    hatch = "///" if span.decision == "rejected" else None
    axes.barh(row, max(stop - start, end * 0.002), left=start, height=0.5, color=colour, hatch=hatch, ec="white")


def _annotate_round(axes: Axes, row: int, span: RoundSpan, end: float, scale: float) -> None:
    """Decision and figures, right of the round's bars or, in the right half of the picture, left of them."""
    first = min((moment for moment in (span.queued, span.started) if moment is not None), default=end * scale) / scale
    last = end if span.finished is None else span.finished / scale
    after = last < end * 0.55
    text = describe_round(span.decision, span.figures) or ("waiting" if span.started is None else "running")
    axes.annotate(
        text,
        (last if after else first, row),
        xytext=(6 if after else -6, 0),
        textcoords="offset points",
        ha="left" if after else "right",
        va="center",
        size=8.5,
        color=INK,
        bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.75},
    )


def _legend_below(axes: Axes, handles: list[Any]) -> None:
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)


def _grid(side: Mapping[str, Any], columns: int) -> tuple[list[str], np.ndarray]:
    """Row labels and values [rows, columns + 1] in bits per byte, the mean last. Long runs are thinned."""
    values = [[math.nan if cell is None else float(cell) for cell in row] for row in side.get("matrix") or ()]
    rows = side.get("rows") or ()
    labels = [str(rows[i].get("label", i)) if i < len(rows) else str(i) for i in range(len(values))]
    if len(values) > MAX_MATRIX_ROWS:
        chosen = np.unique(np.linspace(0, len(values) - 1, MAX_MATRIX_ROWS).round().astype(int))
        values, labels = [values[i] for i in chosen], [labels[i] for i in chosen]
    cells = np.array(values, dtype=np.float64).reshape(len(values), columns)
    return labels, np.column_stack([cells, cells.mean(axis=1)]) if columns else cells


def _draw_grid(
    axes: Axes, labels: list[str], sources: list[str], values: np.ndarray, scale: tuple[float, float]
) -> Any:
    image = axes.imshow(values, cmap="cividis", vmin=scale[0], vmax=scale[1], aspect="auto")
    size = 9 if len(labels) <= 16 else 7
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            ink = "white" if value < scale[0] + 0.55 * (scale[1] - scale[0]) else "black"
            weight = "bold" if row == len(labels) - 1 else "normal"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, size=size, weight=weight)
    axes.axvline(len(sources) - 0.5, color="white", lw=4)
    axes.set_xticks(range(len(sources) + 1), [*map(_name, sources), "mean"], rotation=30, ha="right", size=9)
    axes.set_yticks(range(len(labels)), list(map(_name, labels)), size=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def smooth(values: np.ndarray, half: int) -> np.ndarray:
    """Centred mean over 2 half + 1 values [n], over fewer at the ends. Returns float64 [n]."""
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def _time_unit(seconds: float) -> tuple[str, float]:
    if seconds < 300:
        return "seconds", 1.0
    return ("minutes", 60.0) if seconds < 3 * 3600 else ("hours", 3600.0)
