"""The view in the terminal: its state follows the events, its lines and panels say what the state says."""

from __future__ import annotations

import io
import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli import app
from cluster.live import LiveView
from cluster.panel import render
from cluster.view_state import ViewState
from pipelines.report.events import Event, follow_events
from pipelines.report.lines import Lines, describe

FIGURES = {"mean_change": -0.31, "worst": {"source": "python", "loss": 0.04}}
START: Event = {
    "t": 0.0, "event": "run_started", "resumed": False, "sources": ["cpp", "german"], "base_sources": ["english"],
    "stream_tokens": 400_000,
    "levels": {"slow": {"period": 65536, "owner": "pool"}, "fast": {"period": 2048, "owner": "learner"}},
}  # fmt: skip


def wake(t: float, tokens: int, bpb: float = 3.21) -> Event:
    steps = [{"tokens": tokens, "bpb": {"cpp": bpb}, "surprise": {"cpp": 2.0}, "written": ["fast"], "seconds": 0.1}]
    return {"t": t, "event": "wake", "tokens": tokens, "seconds": 0.1, "tokens_per_second": 21_400.0, "steps": steps,
            "release": 0}  # fmt: skip


def night() -> list[Event]:
    return [
        START,
        {"t": 1.0, "event": "base_finished", "origin": "cached", "tokens": 524_288, "seconds": 0.2},
        {"t": 1.1, "event": "matrix_row", "release": 0, "tokens": 0, "row": {"english": 2.5, "cpp": 4.1}},
        wake(2.0, 163_840),
        {"t": 2.1, "event": "round_queued", "round": 1, "snapshot": 7, "tokens": 163_840, "recent": [0, 80]},
        {"t": 2.2, "event": "round_started", "round": 1, "snapshot": 7, "anchor": 0, "steps": 60, "ranks": 2,
         "zero_stage": 2},
        {"t": 3.0, "event": "round_progress", "round": 1, "step": 30, "steps": 60, "loss": 1.5},
        {"t": 4.0, "event": "round_finished", "round": 1, "steps": 60, "seconds": 1.8, "loss": {"total": 1.4}},
        {"t": 4.1, "event": "gate", "round": 1, "decision": "promoted", "release": 1, "reason": "", "figures": FIGURES},
        {"t": 4.2, "event": "adopted", "release": 1, "tokens": 165_888, "fast_shift_norm": 0.3},
        {"t": 4.3, "event": "matrix_row", "release": 1, "tokens": 165_888, "row": {"english": 2.45, "cpp": 3.0}},
    ]  # fmt: skip


def follow(events: list[Event]) -> ViewState:
    state = ViewState()
    for event in events:
        state.update(event)
    return state


def plain(events: list[Event]) -> list[str]:
    console = Console(file=io.StringIO(), width=60)
    with LiveView("night-1", console) as view:
        for event in events:
            view.handle(event)
    assert isinstance(console.file, io.StringIO)
    lines = [line.split("  ", 1) for line in console.file.getvalue().splitlines()]
    assert all(datetime.fromisoformat(time).utcoffset() is not None for time, _ in lines)
    return [text for _, text in lines]


def test_state_follows_a_night() -> None:
    state = follow(night())
    assert (state.phase, state.tokens, state.stream_tokens, state.release) == ("wake", 163_840, 400_000, 1)
    assert state.sources == ["english", "cpp", "german"] and state.current == ["cpp"]
    assert state.online == {"cpp": 3.21}
    assert state.probe == {"english": 2.45, "cpp": 3.0} and state.final == {}
    assert state.levels["fast"].writes == 1 and state.levels["fast"].last == 2.0
    assert state.levels["slow"].writes == 1 and state.levels["slow"].last == 4.2
    view = state.rounds[1]
    assert (view.state, view.step, view.steps, view.loss, view.figures) == ("promoted", 60, 60, 1.5, FIGURES)


def test_round_states_in_order() -> None:
    state, seen = ViewState(), []
    for event in night():
        state.update(event)
        if 1 in state.rounds:
            seen.append((state.rounds[1].state, state.rounds[1].step))
    assert seen[:5] == [("waiting", 0), ("running", 0), ("running", 30), ("finished", 60), ("promoted", 60)]


def test_the_last_probe_is_final_once_the_run_is_finished() -> None:
    state = follow([*night(), {"t": 9.0, "event": "finished", "seconds": 9.0}])
    assert state.phase == "finished" and state.final == {"english": 2.45, "cpp": 3.0}


def test_unknown_kinds_and_missing_scores_do_no_harm() -> None:
    state = follow(
        [{"t": 1.0, "event": "sunrise"}, {"t": 2.0, "event": "matrix_row", "release": 0, "row": {"a": None}}]
    )
    assert state.now == 2.0 and state.probe == {} and state.sources == ["a"]
    assert describe({"t": 1.0, "event": "sunrise"}) == ""


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (wake(1.0, 163_840), "wake   163,840 tokens  21.4k tok/s  cpp 3.21 bpb"),
        ({"event": "gate", "round": 2, "decision": "promoted", "figures": FIGURES},
         "round 2 promoted: mean -0.31 bpb, worst python +0.04"),
        ({"event": "gate", "round": 3, "decision": "rejected", "figures": {}, "reason": "python loses 0.40"},
         "round 3 rejected (python loses 0.40)"),
        ({"event": "failure", "part": "pool", "error": "rank 1 died", "restarts_left": 2},
         "failure in pool: rank 1 died; 2 restarts left"),
        ({"event": "round_progress", "round": 1, "step": 3, "steps": 9, "loss": None}, "round 1 step 3 of 9"),
        ({"event": "control", "strategy": "replay", "learning_rate": 2e-3, "tokens": 2048, "row": {"a": 2.0}},
         "control replay lr 0.002 at 2,048 tokens: a 2.00 bpb"),
        ({"event": "control_finished", "strategy": "naive", "learning_rate": 2e-3, "mean": 3.456},
         "control naive lr 0.002 ended: mean 3.46 bpb"),
        ({"event": "control_finished", "strategy": "naive", "learning_rate": 2.0, "mean": None},
         "control naive lr 2 ended: it diverged"),
        ({"event": "no_controls", "reason": "the text is yours"}, "no controls: the text is yours"),
        ({"event": "look", "tokens": 9, "release": 2, "served": {"a": 2.0, "b": 3.0}, "rested": {"a": 2.5, "b": 3.5}},
         "look   served 2.500, release 2 alone 3.000 bpb on 2 sources"),
        ({"event": "stopped", "reason": "interrupted", "tokens": 2048}, "stopped at 2,048 tokens: interrupted"),
        (START, "started about 400,000 tokens of cpp, german; levels: slow every 65,536, fast every 2,048 tokens"),
    ],
)  # fmt: skip
def test_lines_read_well(event: dict[str, Any], line: str) -> None:
    assert describe(event) == line


def test_plain_lines_about_waking_come_every_five_seconds_and_others_at_once() -> None:
    events = [wake(float(second), 2048 * second) for second in range(1, 13)]
    events.insert(3, {"t": 3.5, "event": "adopted", "release": 1, "tokens": 6144})
    lines = plain(events)
    assert [line.split()[1] for line in lines if line.startswith("wake")] == ["2,048", "12,288", "22,528"]
    assert lines[1] == "adopted release 1 at 6,144 tokens"


def test_plain_lines_hold_no_escape_codes_and_print_brackets_as_they_are() -> None:
    event = {"t": 1.0, "event": "quarantined", "source": "[bold]x", "origin": "a" * 80, "reason": "not UTF-8"}
    assert plain([event]) == [f"quarantined [bold]x {'a' * 80}: not UTF-8"]


def test_a_terminal_gets_the_panel() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=110, height=50, _environ={})
    with LiveView("night-1", console) as view:
        for event in night():
            view.handle(event)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for part in ("night-1", "163,840 of 400,000", "21.4k tok/s", "promoted", "mean -0.31 bpb, worst python +0.04"):
        assert part in text


@pytest.mark.parametrize("count", range(12))
def test_every_stage_renders(count: int) -> None:
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(render(follow(night()[:count]), "[odd] name"))
    assert "[odd] name" in console.export_text()


def test_a_level_lights_up_when_written_and_goes_dark_again() -> None:
    def lit(state: ViewState) -> bool:
        console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", _environ={})
        with console.capture() as capture:
            console.print(render(state, ""))
        return "\x1b[1;30;103m fast" in capture.get()

    state = follow([START, wake(2.0, 2048)])
    assert lit(state)
    state.update({"t": 60.0, "event": "round_queued", "round": 1})
    assert not lit(state)


def test_recall_has_a_column_where_there_is_recall() -> None:
    def shown(events: list[Event]) -> str:
        console = Console(file=io.StringIO(), width=120)
        console.print(render(follow(events), "night-1"))
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    event = wake(2.0, 163_840)
    assert "with recall" not in shown([START, event])
    event["steps"][0]["recalled"] = {"cpp": 1.87}
    assert "with recall" in shown([START, event]) and "1.87" in shown([START, event])


def test_plain_lines_carry_local_time_with_its_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        assert (
            Lines().line({"t": 1e9, "event": "adopted", "release": 1}).startswith("2001-09-09T07:16:40+05:30  adopted")
        )
    finally:
        monkeypatch.undo()
        time.tzset()


def test_json_lines_are_the_journals_even_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=40, _environ={})
    odd = {"t": 5.0, "event": "quarantined", "source": "[bold]ä" * 30, "origin": "a\nb", "reason": "not UTF-8"}
    with LiveView("night-1", console, as_json=True) as view:
        assert [view.handle(event) for event in [*night(), odd]] == [""] * (len(night()) + 1)
    assert isinstance(console.file, io.StringIO)
    assert [json.loads(line) for line in console.file.getvalue().splitlines()] == [*night(), odd]


def test_logs_print_what_the_run_prints(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="has not begun"):
        CliRunner().invoke(app, ["logs", str(tmp_path)], catch_exceptions=False)
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in night()) + '{"t": 1')
    told = CliRunner().invoke(app, ["logs", str(tmp_path), "--follow"])
    assert told.exit_code == 0 and [line.split("  ", 1)[1] for line in told.output.splitlines()] == plain(night())
    told = CliRunner().invoke(app, ["logs", str(tmp_path), "--json"])
    assert [json.loads(line) for line in told.output.splitlines()] == night()


def test_following_gives_what_is_written_until_the_run_ends(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"t": 0, "event": "a"}\n{"t": 1, "eve')
    asked = iter(['nt": "b"}\n', '{"t": 2, "event": "c"}\n', ""])

    def go_on() -> bool:
        more = next(asked)
        with path.open("a") as file:
            file.write(more)
        return bool(more)

    assert [event["event"] for event in follow_events(path, go_on, pause=0.0)] == ["a", "b", "c"]
