"""What the system around the learning costs, from a short run with real processes. `python -m benchmarks.overhead`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tables import Spread, markdown_table
from pipelines.config.load import load_config
from pipelines.data.module import open_data
from pipelines.report.events import Event, read_events
from pipelines.report.page import read_summary

SOURCES = 3
"""Sources streamed, one round's worth of each: the learner is alone on the first and beside the pool on the others."""
BASE_TOKENS = 32768
TIMEOUT = 600.0
"""Seconds after which a run is given up."""


@dataclass(frozen=True)
class Overhead:
    """Figures of some runs of the same configuration."""

    runs: int
    command: str
    tokens: int
    """Tokens streamed per run."""
    rounds: int
    """Consolidation rounds per run."""
    seconds: Spread
    """Wall seconds per run, by phases; the start of Ray is not in them."""
    system_overhead: Spread
    """Share of the learner's wall time outside its wake steps."""
    log_wait_share: Spread
    """Share of the learner's wall time inside wake steps, waiting for experience to be durable."""
    alone: Spread
    """Tokens per second of the learner over calls during which the pool did nothing, gaps between calls included."""
    beside: Spread
    """The same over calls during which a round was running."""


def measure(repeats: int = 1, overrides: Sequence[str] = ()) -> Overhead:
    """Run `circadian run` with the default model on a shorter stream, `repeats` times, and read its journal.

    Starts and stops a Ray cluster on this machine. The runs live in a temporary folder below the working directory: the
    figures mean nothing on a file system in memory. Raises ValueError for repeats < 1, RuntimeError where a run fails.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    arguments = [*shorter_run(), *overrides]
    with tempfile.TemporaryDirectory(dir=os.getcwd(), prefix=".overhead-bench-") as root:
        directories = [_run(Path(root), f"overhead-{number}", arguments) for number in range(repeats)]
        return read_runs(directories, f"circadian run {' '.join(arguments)}")


def shorter_run() -> list[str]:
    """Overrides of the default configuration that shorten base and stream; model, levels and pool stay its own."""
    cfg = load_config("default")
    period = cfg.pool_period
    sources = open_data(cfg).stream_sources[:SOURCES]
    return [
        f"base.tokens={BASE_TOKENS}",
        f"stream.max_source_bytes={period}",
        f"stream.sources=[{','.join(sources)}]",
        "control.enabled=false",
    ]


def _run(root: Path, name: str, arguments: Sequence[str]) -> Path:
    """One run; returns its directory."""
    command = [sys.executable, "-m", "cluster.cli", "run", f"run.name={name}", f"run.root={root}", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}  # measure this machine
    printed = root / f"{name}.log"  # a file, since Ray's processes could hold a pipe open after the run has ended
    with printed.open("wb") as log:
        done = subprocess.run(
            command, check=False, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=TIMEOUT
        )
    if done.returncode:
        tail = printed.read_text(encoding="utf-8", errors="replace")[-4000:]
        raise RuntimeError(f"{' '.join(command)} exited with status {done.returncode}:\n{tail}")
    return root / name


def read_runs(directories: Sequence[Path], command: str) -> Overhead:
    """Figures of finished runs, from summary.json and events.jsonl of their directories."""
    summaries = [read_summary(directory) for directory in directories]
    calls = [wake_rates(read_events(directory / "events.jsonl")) for directory in directories]
    return Overhead(
        runs=len(directories),
        command=command,
        tokens=int(summaries[0]["tokens_streamed"]),
        rounds=len(summaries[0]["rounds"]),
        seconds=Spread.of(sum(summary["seconds"].values()) for summary in summaries),
        system_overhead=Spread.of(summary["system_overhead"] for summary in summaries),
        log_wait_share=Spread.of(summary["log_wait_share"] for summary in summaries),
        alone=Spread.of(rate for alone, _ in calls for rate in alone),
        beside=Spread.of(rate for _, beside in calls for rate in beside),
    )


def wake_rates(events: Iterable[Event]) -> tuple[list[float], list[float]]:
    """Tokens per second of each call of the learner (no round running, a round running) throughout the call.

    Left out: the first call, which warms up, and calls during which a round began or ended.
    """
    calls: list[Event] = []
    starts: dict[int, float] = {}
    spans: list[tuple[float, float]] = []
    for event in events:
        if event["event"] == "wake":
            calls.append(event)
        elif event["event"] == "round_started":
            starts[event["round"]] = event["t"]
        elif event["event"] == "round_finished":
            spans.append((starts[event["round"]], event["t"]))
    alone, beside = [], []
    for call in calls[1:]:
        begin, end = call["t"] - call["seconds"], call["t"]
        if any(start <= begin and end <= finish for start, finish in spans):
            beside.append(float(call["tokens_per_second"]))
        elif all(end <= start or finish <= begin for start, finish in spans):
            alone.append(float(call["tokens_per_second"]))
    return alone, beside


def render(figures: Overhead) -> str:
    """Markdown: what was run, and one table."""
    runs = "one run" if figures.runs == 1 else f"{figures.runs} runs"
    rows = [
        ["system overhead: learner's time outside wake steps", figures.system_overhead.show(".1%")],
        ["waiting for the log: learner's time inside wake steps", figures.log_wait_share.show(".1%")],
        ["learner, pool at rest, tokens/s", figures.alone.show(",.0f")],
        ["learner, pool asleep beside it, tokens/s", figures.beside.show(",.0f")],
        ["wall seconds of base, stream and report", figures.seconds.show(".0f")],
    ]
    about = (
        f"`{figures.command}`: {runs} of {figures.tokens:,} tokens and {figures.rounds} rounds. Shares and seconds: "
        "median and spread over runs; tokens/s: over calls of the learner."
    )
    return f"{about}\n\n{markdown_table(['', 'median (min .. max)'], rows)}"


def main() -> None:
    """Measure and print the table."""
    print(render(measure()))


if __name__ == "__main__":
    main()
