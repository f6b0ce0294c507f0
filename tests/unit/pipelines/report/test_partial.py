"""The report of a run that is not finished: what is known is on the page, what is not is left out of it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any, List

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli import app
from pipelines.machine.records import RoundRecord
from pipelines.machine.state import STATE_FILE, Phase, RunState
from pipelines.report.events import Event
from pipelines.report.page import headline, is_too_short, render_summary_table, source_lines, write_report
from pipelines.report.partial import is_unfinished, partial_summary
from tests.unit.pipelines.report.test_report import BASE, STREAM, make_events, make_summary

SOURCES = [*BASE, *STREAM]


def make_state(**changes: Any) -> RunState:
    rows = [
        {"release": 0, "tokens": 0, "bpb": dict.fromkeys(SOURCES, 4.0)},
        {"release": 1, "tokens": 327_680, "bpb": dict.fromkeys(SOURCES, 3.0)},
    ]
    figures = {"mean_change": -0.31, "worst": {"source": "python", "loss": 0.04}}
    rounds = [RoundRecord(1, 327_680, 0, 1, 120, "promoted", snapshot=40, seconds=6.0, figures=figures)]
    flops = {"wake": 4e14, "sleep": 5e14, "control": 0.0, "base": 0.0}
    state = RunState(phase=Phase.STREAM, live=1, tokens=400_000, rows=rows, rounds=rounds, flops=flops)
    state.wake.update(tokens=400_000.0, inside=20.0, wall=25.0)
    for name, value in changes.items():
        setattr(state, name, value)
    return state


def make_run(folder: Path, events: List[Event], state: RunState | None) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "config.yaml").write_text("run:\n  name: night\n")
    if state is not None:
        (folder / STATE_FILE).write_text(json.dumps(state.to_json()))
    return folder


def begun(count: int) -> List[Event]:
    events = make_events(24)[:count]
    if events:
        events[0] = {**events[0], "sources": SOURCES}
    return events


@pytest.mark.parametrize("count", [0, 3, 400])
def test_every_moment_has_a_page(tmp_path: Path, count: int) -> None:
    run_dir = make_run(tmp_path / "night", begun(count), make_state() if count > 6 else None)
    assert is_unfinished(run_dir)
    page = write_report(run_dir, partial_summary(run_dir)).read_text()
    assert "This run is not finished (" in page and "No control was trained" not in page
    assert ("Bits per byte by source so far" in page) == (count > 6)
    assert ('alt="Online' in page) == (count > 3)
    for word in (
        "Forgetting",
        "Backward transfer",
        "<h2>Experiences",
        "experiences lost",
        "Final bits",
        "version</th>",
    ):
        assert word not in page, word


def test_what_is_known_is_said(tmp_path: Path) -> None:
    control = {f"replay@{rate}": {"rows": make_state().rows, "flops": 5.0} for rate in (0.1, 0.2)}
    control["replay@0.2"]["rows"] = [{"release": 0, "tokens": 0, "bpb": dict.fromkeys(SOURCES, 2.5)}]
    run_dir = make_run(tmp_path / "night", begun(40), make_state(control=control, phase=Phase.CONTROL))
    summary = partial_summary(run_dir)
    assert summary["mean_final_bpb"] == 3.0 and summary["tokens_streamed"] == 400_000
    assert [(name, side["learning_rate"], side["mean_final_bpb"]) for name, side in summary["controls"].items()] == [
        ("replay", 0.2, 2.5)
    ]
    page = write_report(run_dir, summary).read_text()
    text = re.sub(r"<[^>]*>", "", page)
    for part in ("phase control, 400,000 of about 196,608 tokens", "Mean bits per byte so far", "3.000", "2.500"):
        assert part in text, part
    assert "promoted: mean -0.31 bpb, worst python +0.04" in page and "900 TFLOP" in page


def test_the_command_works_before_the_end_and_names_what_is_no_run(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "night", begun(20), make_state())
    done = CliRunner().invoke(app, ["report", str(run_dir)])
    assert done.exit_code == 0, done.output
    assert "not finished: died, phase stream" in done.output and "3.000" in done.output
    assert (run_dir / "report.html").is_file() and not (run_dir / "summary.json").exists()
    with pytest.raises(ValueError, match="is no run directory"):
        CliRunner().invoke(app, ["report", str(tmp_path)], catch_exceptions=False)


def test_a_run_that_is_for_trying_says_so_and_names_no_winner(tmp_path: Path) -> None:
    summary = make_summary()
    assert any(line.best >= 0 for line in headline(summary)) and not is_too_short(summary)
    short = {**summary, "tokens_streamed": 24_576}
    assert {line.best for line in (*headline(short), *source_lines(short))} == {-1}
    said = "for trying: a stream of 24,576 tokens is too short for these figures to mean anything"
    for width in (80, 140):
        console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor", _environ={})
        console.print(render_summary_table(short))
        assert isinstance(console.file, io.StringIO)
        text = console.file.getvalue()
        assert "\x1b[1;32m" not in text, "bold green is for what is better"
        plain = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())
        assert said in plain
        assert all(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) <= width for line in text.splitlines())
    run_dir = make_run(tmp_path / "smoke", begun(20), None)
    page = write_report(run_dir, short).read_text()
    assert f"This run is {said}." in page and 'class="number better"' not in page
