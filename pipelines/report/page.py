"""The report of a run: one HTML page that opens offline, PNGs beside it, and a table for the terminal."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.table import Table
from rich.text import Text

from pipelines.data.printable import printable
from pipelines.dreams.report import dream_section
from pipelines.gate.report import awake_rows, gate_rows
from pipelines.report.events import Timeline, build_timeline, describe_round, read_events, short_number
from pipelines.report.looks import look_rows
from pipelines.report.plots import write_plots
from pipelines.report.sides import sides

NOTHING = "\N{EN DASH}"


@dataclass(frozen=True)
class Line:
    """One line of a comparison: texts ready to show."""

    label: str
    hint: str
    cells: tuple[str, ...]
    """The run's, then each control's, as `sides` has them."""
    best: int
    """Place of the side that is better than all others; -1 where none is."""


def write_report(run_dir: Path) -> Path:
    """Write report.html and its PNGs into a run directory from summary.json, events.jsonl and config.yaml.

    Works while the run goes on, with what is there. Returns the path of the page.
    Raises ValueError if summary.json is missing or no JSON object.
    """
    run_dir = Path(run_dir)
    summary = read_summary(run_dir)
    journal = run_dir / "events.jsonl"
    timeline = build_timeline(read_events(journal)) if journal.exists() else Timeline()
    plots = write_plots(timeline, summary, run_dir)
    config = run_dir / "config.yaml"
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            name=run_dir.resolve().name,
            sides=[name for name, _ in sides(summary)],
            controls=control_facts(summary),
            headline=headline(summary),
            facts=_facts(summary, timeline),
            sources=source_lines(summary),
            rounds=_round_rows(summary),
            gates=gate_rows(summary),
            awake=awake_rows(summary),
            looks=look_rows(timeline),
            dreams=dream_section(summary),
            costs=_costs(summary),
            experiences=[(f"{value:,}", key) for key, value in (summary.get("experiences") or {}).items()],
            quarantined=timeline.quarantined,
            failures=timeline.failures,
            versions=summary.get("versions") or {},
            config=config.read_text(encoding="utf-8") if config.exists() else "",
            images={name: _data_uri(path) for name, path in plots.items()},
        )
    )
    target = run_dir / "report.html"
    target.write_text(page, encoding="utf-8")
    return target


def read_summary(run_dir: Path) -> dict[str, Any]:
    """The figures of a run. Raises ValueError with a remedy if summary.json is missing or no JSON object."""
    path = Path(run_dir) / "summary.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; run the stream to its end first, or check the run's name")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); delete it and run the same name again") from None
    if not isinstance(summary, dict):
        raise ValueError(f"{path} holds a {type(summary).__name__} instead of an object; delete it and run again")
    return summary


def headline(summary: Mapping[str, Any]) -> list[Line]:
    """The figures that decide, the run against its controls. Scores in bits per byte."""
    found = [figures for _, figures in sides(summary)]
    older = (summary.get("flops") or {}).get("control") if summary.get("control") else None

    def line(key: str, label: str, hint: str, sign: int = -1) -> Line:
        return _line(label, hint, [figures.get(key) for figures in found], bits, sign)

    lines = [
        line(
            "mean_final_bpb", "Mean final bits per byte", "held-out text of every source, at the end; lower is better"
        ),
        line("forgetting", "Forgetting", "how much worse a source ends than it was when just learned; lower is better"),
        line("learning", "Learning", "bits per byte on a source when it was just learned; lower is better"),
        line("backward_transfer", "Backward transfer", "change of earlier sources by later ones; higher is better", 1),
    ]
    hint = "floating-point operations awake and asleep, the gate's included; of a control: of the trial shown"
    spent = [(summary.get("flops") or {}).get("total"), *(figures.get("flops", older) for figures in found[1:])]
    lines.append(_line("Training FLOPs", hint, spent, flop))
    return lines


def source_lines(summary: Mapping[str, Any]) -> list[Line]:
    """Final held-out bits per byte of each source, the run against its controls."""
    rows = [_last_row(figures) for _, figures in sides(summary)]
    base = set(summary.get("base_sources") or ())
    return [
        _line(str(source), "base" if source in base else "", [_at(row, i) for row in rows], bits, sign=-1)
        for i, source in enumerate(summary.get("sources") or ())
    ]


def control_facts(summary: Mapping[str, Any]) -> list[str]:
    """A sentence for each control: its best step size, whether that is an optimum, and what all of them came to."""
    facts = []
    for name, figures in sides(summary)[1:]:
        tried = figures.get("tried") or ()
        if not tried:
            continue
        shown = ", ".join(f"{trial['learning_rate']:g} ({bits(trial.get('mean_final_bpb'))})" for trial in tried)
        edge = ", best at the edge of what was tried" if figures.get("edge") else ""
        facts.append(f"{name}: step size {figures['learning_rate']:g}{edge}; tried, with their final means: {shown}")
    return facts


def render_summary_table(summary: Mapping[str, Any]) -> Table:
    """The run against its controls for the terminal: headline figures, then each source. The best side is bold."""
    names = [name for name, _ in sides(summary)]
    caption = ["bits per byte on held-out text; lower is better", *control_facts(summary)]
    table = Table(
        title=f"{names[0]} and {'its controls' if len(names) > 2 else names[1]}",
        caption="\n".join(text.replace("[", r"\[") for text in caption),
    )
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for section in (headline(summary), source_lines(summary)):
        for line in section:
            cells = [f"[bold green]{text}[/]" if i == line.best else text for i, text in enumerate(line.cells)]
            table.add_row(Text(printable(line.label)), *cells)
        table.add_section()
    return table


def bits(value: Optional[float]) -> str:
    """Bits per byte with three decimals; a dash for what is missing."""
    return NOTHING if _missing(value) else f"{value:.3f}".replace("-", "\N{MINUS SIGN}")


def flop(value: Optional[float]) -> str:
    """Floating-point operations with a suffix: 1.23 PFLOP."""
    if value is None or _missing(value):
        return NOTHING
    text = short_number(value)
    return f"{text[:-1]} {text[-1]}FLOP" if text[-1].isalpha() else f"{text} FLOP"


def duration(seconds: Optional[float]) -> str:
    """Seconds as people say them: 42.0 s, 3 min 5 s, 2 h 14 min."""
    if seconds is None or _missing(seconds):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _facts(summary: Mapping[str, Any], timeline: Timeline) -> list[tuple[str, str]]:
    """(figure, what it says) for the first glance; what is not known yet is left out."""
    rounds = summary.get("rounds") or ()
    promoted = sum(item.get("decision") == "promoted" for item in rounds)
    experiences = summary.get("experiences") or {}
    facts = []
    if summary.get("tokens_streamed") is not None:
        facts.append((f"{summary['tokens_streamed']:,}", "tokens streamed, each once"))
    if summary.get("wake_tokens_per_second") is not None:
        facts.append((short_number(summary["wake_tokens_per_second"]), "tokens per second awake"))
    facts.append((str(len(rounds)), f"consolidation rounds, {promoted} promoted"))
    if "lost" in experiences:
        facts.append((f"{experiences['lost']:,}", f"experiences lost, {experiences.get('committed', 0):,} committed"))
    if timeline.read.bpb is not None:
        facts.append((bits(timeline.read.bpb), "online bits per byte, weights alone"))
    if timeline.read.recalled_bpb is not None:
        facts.append((bits(timeline.read.recalled_bpb), "online bits per byte, read with recall"))
    if summary.get("system_overhead") is not None:
        facts.append((f"{summary['system_overhead']:.1%}", "system overhead"))
    if timeline.failures:
        facts.append((str(len(timeline.failures)), "failures survived"))
    return facts


def _round_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = []
    for item in summary.get("rounds") or ():
        decision = item.get("decision") or ""
        row = {
            key: NOTHING if item.get(key) is None else f"{item[key]:,}"
            for key in ("id", "snapshot", "steps", "release")
        }
        row |= {"time": duration(item.get("seconds")), "decision": decision}
        rows.append(row | {"gate": describe_round(decision, item.get("figures") or {}) or "open"})
    return rows


def _costs(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    costs = [(flop(value), key) for key, value in (summary.get("flops") or {}).items()]
    return costs + [
        (duration(v), f"time: {key.replace('_', ' ')}") for key, v in (summary.get("seconds") or {}).items()
    ]


def _missing(value: Optional[float]) -> bool:
    return value is None or not math.isfinite(value)


def _line(
    label: str,
    hint: str,
    values: Sequence[Optional[float]],
    show: Callable[[Optional[float]], str],
    sign: int = 0,
) -> Line:
    """sign: -1 if lower is better, +1 if higher is, 0 if neither is."""
    cells = tuple(show(value) for value in values)
    known = [(value * -sign, i) for i, value in enumerate(values) if value is not None and math.isfinite(value)]
    best = -1
    if sign and len(known) > 1:
        best = min(known)[1]
        # What reads the same is the same.
        best = best if [cells[i] for _, i in known].count(cells[best]) == 1 else -1
    return Line(label, hint, cells, best)


def _last_row(side: Mapping[str, Any]) -> list[Optional[float]]:
    rows = side.get("matrix") or [[]]
    return list(rows[-1])


def _at(row: list[Optional[float]], index: int) -> Optional[float]:
    return row[index] if index < len(row) else None


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(bits=bits, flop=flop, duration=duration, short=short_number)
    return environment
