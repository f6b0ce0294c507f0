"""Commands that look at a run, whatever it is doing: `circadian status`, `report`, `logs`. None of them changes it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import List, Tuple

import typer

from cluster.output import open_console, trouble_of
from pipelines.report.events import follow_events, short_number, stamp, to_line
from pipelines.report.lines import Lines
from pipelines.report.status import Status, check_run_dir, is_held, read_status
from pipelines.report.words import duration

RUN_DIR = typer.Argument(..., metavar="RUN_DIR", help="A run directory, runs/NAME.")
SOURCES = 6
"""Sources that a line names; of more, the mean and a count must do."""


def status(
    run_dir: Path = RUN_DIR,
    as_json: bool = typer.Option(False, "--json", help="One JSON object instead of lines."),
) -> None:
    """Say where a run is: running or not, how far, what is live, what the gate last said."""
    found, console = read_status(run_dir), open_console()
    if as_json:
        console.out(json.dumps(found.to_json()), highlight=False)
        return
    for label, text in status_lines(found, time.time()):
        console.print(f"{label:<16}{text}", markup=False, highlight=False, soft_wrap=True)


def report(run_dir: Path = RUN_DIR) -> None:
    """Write report.html and its plots anew and print the figures; of a run that is not finished, those so far."""
    from pipelines.report.page import read_summary, render_summary_table, write_report  # noqa: PLC0415 (plots load slowly)
    from pipelines.report.partial import is_unfinished, partial_summary  # noqa: PLC0415

    summary = partial_summary(run_dir) if is_unfinished(run_dir) else read_summary(run_dir)
    page = write_report(run_dir, summary)
    console = open_console()
    if summary.get("unfinished"):
        console.print(f"not finished: {summary['unfinished']}", markup=False, highlight=False, soft_wrap=True)
    if summary.get("matrix"):
        console.print(render_summary_table(summary))
    console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)


def logs(
    run_dir: Path = RUN_DIR,
    follow: bool = typer.Option(False, "--follow", "-f", help="Go on until the run's process ends."),
    as_json: bool = typer.Option(False, "--json", help="The journal's events, one JSON object per line."),
) -> None:
    """Print what happened in a run, a line per event, as `run` prints it where nobody watches."""
    check_run_dir(run_dir)
    journal, console, lines = run_dir / "events.jsonl", open_console(), Lines()
    if not journal.exists():
        raise ValueError(f"{journal} does not exist yet; the run has not begun, try again in a moment")
    for event in follow_events(journal, lambda: follow and is_held(run_dir)):
        if text := to_line(event) if as_json else lines.line(event):
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        if trouble_of(console):  # whoever read has enough
            return


def status_lines(found: Status, now: float) -> List[Tuple[str, str]]:
    """(what, how it stands); what is not known yet is left out.

    Args:
        now: unix seconds.
    """
    lines = [(found.run, _state(found)), ("phase", _phase(found)), ("release", f"{found.release} is live")]
    rounds = found.rounds
    if rounds.promoted or rounds.rejected or rounds.queued or rounds.running is not None:
        counts = f"{rounds.promoted} promoted, {rounds.rejected} rejected, {rounds.queued} queued"
        running = f"; {rounds.running} is running, step {rounds.step} of {rounds.steps}"
        lines.append(("rounds", counts + ("" if rounds.running is None else running)))
    if rounds.last_rejection:
        lines.append(("last rejection", rounds.last_rejection))
    if found.mean_bpb is not None:
        lines.append(("bits per byte", f"mean {found.mean_bpb:.3f}{_scores(found.bpb)}"))
    if found.online_bpb:
        lines.append(("read last", _scores(found.online_bpb).removeprefix(": ")))
    if found.controls.done or found.controls.trials:
        of = f" of {found.controls.trials}" if found.controls.trials else ""
        lines.append(("controls", f"{found.controls.done}{of} done"))
    if found.written is not None:
        lines.append(("last written", f"{_ago(now - found.written)} ago, {stamp(found.written)}"))
    return lines


def _state(found: Status) -> str:
    text = found.state + (f" ({found.reason})" if found.reason and found.reason != found.state else "")
    if found.alive:
        who = f"process {found.process} on {found.host}" if found.process else "a process"
        return f"{text}, {who} is alive"
    ended = found.state in ("finished", "not started")
    return f"{text}, no process is alive" + ("" if ended else "; the same command continues it")


def _phase(found: Status) -> str:
    text = found.phase
    if found.phase == "base" and found.base_of:
        text += f", {found.base_tokens:,} of {found.base_of:,} tokens"
    elif found.stream_tokens:
        text += f", {found.tokens:,} of about {found.stream_tokens:,} tokens"
    speed = found.tokens_per_second if found.phase in ("base", "stream") and found.state == "running" else None
    return text + (f", {short_number(speed)} tokens/s" if speed else "")


def _scores(scores: object) -> str:
    assert isinstance(scores, dict)
    if len(scores) > SOURCES:
        return f" of {len(scores)} sources"
    return ": " + ", ".join(f"{source} {bpb:.3f}" for source, bpb in scores.items())


def _ago(seconds: float) -> str:
    return duration(max(0.0, seconds))
