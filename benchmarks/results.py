"""Every benchmark in one run, written to benchmarks/RESULTS.md. `python -m benchmarks.results [--quick | --pages]`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import overhead, store, wake
from benchmarks.tables import Machine, Spread, markdown_table
from nl_model.weights import write_durably
from pipelines.report.versions import versions

RESULTS = Path(__file__).with_name("RESULTS.md")
KEPT = Path(__file__).parent / "results"
CHAPTERS = {
    "real-run": "A run against strategy=replay",
    "real-run-shuffled": "The same on text that does not shift",
    "model": "The model against a plain transformer",
    "streaming": "A million tokens in fixed memory",
    "levels": "Five levels against one, two and three",
    "probes": "Memory probes",
    "sleep": "Sleep on ranks",
    "gate": "The gate against planted candidates",
}
"""Benchmarks that are run by themselves and keep a page in results/, by name; RESULTS.md takes these pages in."""
SUMMARY = "## Summary"
APPENDED, FLOOR = "append: store, commit per 512", "append: pyarrow, commit's 3 fsyncs"
SAMPLED, DATASET = "sample: store", "sample: pyarrow dataset take"


@dataclass(frozen=True)
class Repeats:
    """How often each benchmark measures."""

    wake: int
    store: int
    overhead: int


FULL, QUICK = Repeats(wake=7, store=5, overhead=3), Repeats(wake=3, store=2, overhead=1)


@dataclass(frozen=True)
class Circumstances:
    """What figures depend on beside the code."""

    command: str
    date: str
    machine: Machine
    load: float
    """Processes that wanted to run in the minute before the start, on average; figures want it near 0."""
    versions: Mapping[str, str]

    @classmethod
    def here(cls) -> Circumstances:
        """Those of this machine right now."""
        date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        return cls(command_line(), date, Machine.here(), os.getloadavg()[0], versions())


@dataclass(frozen=True)
class Measured:
    """What the benchmarks returned."""

    wake: Mapping[str, wake.StepFigures]
    store: Mapping[str, store.Figures]
    overhead: overhead.Overhead


def measure(repeats: Repeats) -> Measured:
    """Run every benchmark, one after the other; the machine should do nothing else meanwhile."""
    print("wake, plain and sleep steps ...", flush=True)
    steps = wake.measure(repeats.wake)
    print("experience store ...", flush=True)
    stored = store.measure(repeats.store)
    print("a run with real processes ...", flush=True)
    return Measured(steps, stored, overhead.measure(repeats.overhead))


def render(measured: Measured, circumstances: Circumstances) -> str:
    """RESULTS.md as text."""
    about = circumstances
    made_with = ", ".join(f"{name} {number}" for name, number in about.versions.items())
    sections = [
        "# Benchmarks",
        f"Written by `{about.command}` on {about.date}; the next run writes it anew. Figures are medians, with the "
        "least and the most measured in brackets; ratios are taken repeat by repeat.",
        f"* machine: {about.machine.show()}\n* load before the start: {about.load:.2f}\n* versions: {made_with}",
        SUMMARY,
        summary(measured),
        "## Steps",
        "The same model and the same batches of random tokens, interleaved, one thread. The wake step's log is durable "
        "at once; the sleep step is that of a pool of one rank without DeepSpeed. *CPU / plain* is the figure that "
        "other work on the machine disturbs least.",
        wake.render(measured.wake),
        "## Experience store",
        f"{store.ROWS:,} rows of {store.CONTEXT + 1} {store.DTYPE} tokens; draws of {store.DRAW} rows.",
        _store_table(measured.store),
        "## A run with real processes",
        overhead.render(measured.overhead),
        *chapters(KEPT),
    ]
    return "\n\n".join(sections) + "\n"


def chapters(folder: Path) -> list[str]:
    """Headings and pages of the benchmarks that are run by themselves, as far as they are kept in a folder."""
    parts = []
    for name, title in CHAPTERS.items():
        page = folder / f"{name}.md"
        if page.is_file():
            text = page.read_text(encoding="utf-8").strip().replace("](", f"]({folder.name}/")  # links are the page's
            parts += [f"## {title}", text]
    return parts


def command_line() -> str:
    """The `python -m` that this process was started with, as it would be typed."""
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


def keep_page(json_file: Path, body: str, command: str = "") -> None:
    """Lay a benchmark's page beside its JSON file: the command (this process's, if empty) and the machine above it."""
    about = (
        f"Made by `{command or command_line()}` on {Machine.here().show()}, {datetime.now(UTC).strftime('%Y-%m-%d')}."
    )
    write_durably(json_file.with_suffix(".md"), f"{about}\n\n{body}\n".encode())


def summary(measured: Measured) -> str:
    """The figures that decide, as a Markdown list; README.md repeats them."""
    lines = []
    for name, figures in measured.wake.items():
        awake, asleep = figures.costs["wake"], figures.costs["sleep"]
        lines.append(
            f"Model `{name}` ({figures.parameters / 1e6:.1f}M parameters): a wake step takes "
            f"{awake.cpu_ratio.show('.2f')} of a plain training step's CPU time and {awake.flops_ratio:.2f} of its "
            f"FLOPs, a sleep step {asleep.cpu_ratio.show('.2f')} and {asleep.flops_ratio:.2f}."
        )
    rows, ratio = _rates(measured.store, APPENDED, FLOOR)
    lines.append(
        f"The store appends {rows.show(',.0f')} rows/s with a durable commit per {store.GROUP} rows, "
        f"{ratio.show('.2f')} times what pyarrow does with the same fsyncs."
    )
    rows, ratio = _rates(measured.store, SAMPLED, DATASET)
    lines.append(
        f"It samples {rows.show(',.0f')} rows/s by surprise, {ratio.show('.1f')} times pyarrow's `dataset.take`."
    )
    run = measured.overhead
    lines.append(
        f"In a run the learner spends {run.system_overhead.show('.1%')} of its time outside wake steps, and "
        f"{run.log_wait_share.show('.1%')} waiting for experience to be durable. It learns {run.alone.show(',.0f')} "
        f"tokens/s with the pool at rest, {run.beside.show(',.0f')} with the pool asleep on the same cores."
    )
    return "\n".join(f"* {line}" for line in lines)


def _rates(figures: Mapping[str, store.Figures], ours: str, theirs: str) -> tuple[Spread, Spread]:
    """Rows per second of one way of the store, and by those of the way it is held against."""
    rate, other = figures[ours], figures[theirs]
    return (
        Spread(rate["rows_per_s"], rate["min"], rate["max"]),
        Spread(other["ratio"], other["ratio_min"], other["ratio_max"]),
    )


def _store_table(figures: Mapping[str, store.Figures]) -> str:
    rows = []
    for name in figures:
        rate, ratio = _rates(figures, name, name)
        rows.append([name, rate.show(",.0f"), ratio.show(".2f")])
    return markdown_table(["way", "rows/s", "store / this"], rows)


def with_pages(text: str, folder: Path = KEPT) -> str:
    """RESULTS.md with the pages that are kept now instead of those it has; what was measured by itself stays."""
    ends = [place for title in CHAPTERS.values() if (place := text.find(f"\n\n## {title}\n")) >= 0]
    return "\n\n".join([text[: min(ends, default=len(text))].rstrip(), *chapters(folder)]) + "\n"


def main() -> None:
    """Measure everything and write RESULTS.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, for a first look")
    parser.add_argument("--pages", action="store_true", help="measure nothing; take in the pages of results/ anew")
    options = parser.parse_args()
    if options.pages:
        write_durably(RESULTS, with_pages(RESULTS.read_text(encoding="utf-8")).encode())
        print(f"pages taken into {RESULTS}")
        return
    circumstances = Circumstances.here()
    measured = measure(QUICK if options.quick else FULL)
    write_durably(RESULTS, render(measured, circumstances).encode())
    print(f"\n{summary(measured)}\n\nwritten to {RESULTS}")


if __name__ == "__main__":
    main()
