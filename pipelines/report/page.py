"""The report of a run: one HTML page that opens offline, PNGs beside it, and a table for the terminal."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.table import Table

from pipelines.dreams.report import dream_section
from pipelines.gate.report import gate_rows
from pipelines.report.events import Timeline, build_timeline, describe_round, read_events, short_number
from pipelines.report.plots import write_plots

NOTHING = "\N{EN DASH}"


@dataclass(frozen=True)
class Line:
    """One line of a comparison: texts ready to show, and which side is better ("circadian", "control" or "")."""

    label: str
    hint: str
    circadian: str
    control: str
    better: str


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
            control=summary.get("control"),
            headline=headline(summary),
            facts=_facts(summary, timeline),
            sources=source_lines(summary),
            rounds=_round_rows(summary),
            gates=gate_rows(summary),
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
    """The figures that decide, Circadian against the control. Scores in bits per byte."""
    control = summary.get("control") or {}
    flops = summary.get("flops") or {}

    def line(key: str, label: str, hint: str, sign: int = -1) -> Line:
        return _line(label, hint, summary.get(key), control.get(key), bits, sign)

    lines = [
        line(
            "mean_final_bpb", "Mean final bits per byte", "held-out text of every source, at the end; lower is better"
        ),
        line("forgetting", "Forgetting", "how much worse a source ends than it was when just learned; lower is better"),
        line("learning", "Learning", "bits per byte on a source when it was just learned; lower is better"),
        line("backward_transfer", "Backward transfer", "change of earlier sources by later ones; higher is better", 1),
    ]
    hint = "floating-point operations of training, awake and asleep"
    lines.append(_line("Training FLOPs", hint, flops.get("total"), flops.get("control") if control else None, flop))
    return lines


def source_lines(summary: Mapping[str, Any]) -> list[Line]:
    """Final held-out bits per byte of each source, Circadian against the control."""
    final, other = _last_row(summary), _last_row(summary.get("control") or {})
    base = set(summary.get("base_sources") or ())
    return [
        _line(str(source), "base" if source in base else "", _at(final, i), _at(other, i), bits, sign=-1)
        for i, source in enumerate(summary.get("sources") or ())
    ]


def render_summary_table(summary: Mapping[str, Any]) -> Table:
    """Circadian against the control for the terminal: headline figures, then each source. The better side is bold."""
    table = Table(title="Circadian and control", caption="bits per byte on held-out text; lower is better")
    table.add_column("")
    table.add_column("Circadian", justify="right")
    table.add_column("control", justify="right")
    for section in (headline(summary), source_lines(summary)):
        for line in section:
            sides = [
                f"[bold green]{text}[/]" if line.better == side else text
                for side, text in (("circadian", line.circadian), ("control", line.control))
            ]
            table.add_row(line.label.replace("[", r"\["), *sides)
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
    ours: Optional[float],
    theirs: Optional[float],
    show: Callable[[Optional[float]], str],
    sign: int = 0,
) -> Line:
    """sign: -1 if lower is better, +1 if higher is, 0 if neither is."""
    better = ""
    # What reads the same is the same.
    if sign and ours is not None and theirs is not None and show(ours) != show(theirs) and math.isfinite(ours - theirs):
        better = "circadian" if (ours - theirs) * sign > 0 else "control"
    return Line(label, hint, show(ours), show(theirs), better)


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
