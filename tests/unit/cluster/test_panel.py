"""The panel fits the terminal, whatever a run has come to, and uses the room that there is."""

from __future__ import annotations

import io
import re
from typing import List

import pytest
from rich.console import Console

from cluster.live import LiveView
from cluster.panel import render
from cluster.view_state import ViewState
from pipelines.report.events import Event
from tests.unit.cluster.test_live import START, follow, night, wake

SIZES = [(80, 24), (140, 50), (40, 10), (200, 60), (20, 5), (110, 24)]


def lines_of(state: ViewState, width: int, height: int, name: str = "night-1") -> List[str]:
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=True, _environ={})
    console.print(render(state, name, *console.size))
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue()).splitlines()


def control(kind: str, rate: float, **fields: object) -> Event:
    return {"t": 90.0, "event": kind, "strategy": "replay", "learning_rate": rate, **fields}


def crowd() -> List[Event]:
    """Forty sources with long names, sixty rounds with long reasons, messages without end."""
    sources = [f"a/very/long/path/to/source-{i:02d}.parquet" for i in range(40)]
    events: List[Event] = [{**START, "sources": sources, "base_sources": sources[:2]}]
    scores = dict.fromkeys(sources, 12.3456)
    events.append({"t": 1.0, "event": "matrix_row", "release": 0, "row": scores})
    step = {"tokens": 2048, "bpb": scores, "recalled": scores, "written": ["fast"]}
    events.append({"t": 2.0, "event": "wake", "tokens": 2048, "tokens_per_second": 1e6, "steps": [step]})
    for number in range(1, 61):
        reason = f"forgets {sources[3]} by 1.604, which is more than gate.max_forgetting allows"
        gate = {"round": number, "decision": "rejected", "reason": reason, "figures": {}}
        events.append({"t": 3.0, "event": "round_started", "round": number, "steps": 123456})
        events.append(
            {"t": 3.0, "event": "round_progress", "round": number, "step": 1234, "steps": 123456, "loss": 9.87}
        )
        events.append({"t": 4.0, "event": "gate", **gate})
    return events


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("which", ["empty", "night", "crowd", "controls"])
def test_it_fits(which: str, width: int, height: int) -> None:
    trials = [control("control_started", i / 64, trial=i, trials=60) for i in range(1, 60)]
    events = {"empty": [], "night": night(), "crowd": crowd(), "controls": [*crowd(), *trials]}[which]
    lines = lines_of(follow(events), width, height, "a name that is longer than the terminal is wide " * 5)
    assert max(map(len, lines)) < width, "a full line would break at what the terminal echoes"
    assert len(lines) < height or height < 6


@pytest.mark.parametrize(("width", "height"), [(80, 24), (140, 50)])
def test_a_crowd_fills_the_room(width: int, height: int) -> None:
    lines = lines_of(follow(crowd()), width, height)
    assert len(lines) >= height - 3 and max(map(len, lines)) == width - 3
    for part in ("tok/s", "with recall", "source (", "rejected", "forgets a/very"):
        assert any(part in line for line in lines), part


def test_a_night_at_80x24_shows_all_parts() -> None:
    text = "\n".join(lines_of(follow(night()), 80, 24))
    for part in ("163,840 of 400,000 tokens  21.4k tok/s", "fast  1 writes", "english", "cpp", "mean -0.31 bpb, worst"):
        assert part in text
    assert "adopted release 1 at 165,888 tokens" in text


def test_the_base_shows_how_far_and_how_fast() -> None:
    events: List[Event] = [START, {"t": 1.0, "event": "base_started", "tokens": 16384, "sources": ["english"]}]
    assert "0 of 16,384 tokens of the base" in "\n".join(lines_of(follow(events), 80, 24))
    events.append({"t": 3.0, "event": "base_progress", "tokens": 4096, "of": 16384, "tokens_per_second": 2048.0})
    assert "4,096 of 16,384 tokens of the base  2.05k tok/s" in "\n".join(lines_of(follow(events), 80, 24))


def test_a_resumed_run_is_where_it_was() -> None:
    stopped: Event = {"t": 20.0, "event": "stopped", "tokens": 163_840, "reason": "interrupted"}
    console = Console(width=80, height=24, file=io.StringIO(), force_terminal=True, _environ={})
    with LiveView("night-1", console) as view:
        view.restore([*night(), {"t": 5.0, "event": "round_started", "round": 2, "steps": 9}, stopped])
        view.handle({**START, "t": 99.0, "resumed": True})
        state = view.state
    assert (state.phase, state.tokens, state.release, state.tokens_per_second) == ("wake", 163_840, 1, 0.0)
    assert [round.state for round in state.rounds.values()] == ["promoted", "waiting"]
    shown = "\n".join(lines_of(state, 80, 24))
    assert "163,840 of 400,000 tokens" in shown and "resumed about 400,000" in shown


def test_a_journal_that_cannot_be_read_restores_what_it_can() -> None:
    with LiveView("night-1", Console(file=io.StringIO())) as view:
        view.restore([START, wake(2.0, 2048), {"event": "wake"}, wake(3.0, 4096)])
        assert view.state.tokens == 2048 and view.handle(wake(4.0, 8192)) == ""


def test_controls_show_which_trial_of_how_many() -> None:
    events = [
        *night(),
        control("control_started", 2e-3, trial=1, trials=4),
        control("control_started", 4e-3, trial=2, trials=4),
        control("control", 2e-3, tokens=81_920, row={"cpp": 2.0}),
        control("control_finished", 4e-3, mean=3.456),
    ]
    state = follow(events)
    assert (state.phase, state.trials_done, state.trials_planned) == ("control", 1, 4)
    text = "\n".join(lines_of(state, 80, 24))
    for part in ("1 of 4 trials of controls", "1 of 4  replay   0.002", "81,920 tokens", "2 of 4", "mean 3.46 bpb"):
        assert part in text, text


def test_the_panel_is_gone_at_the_end_and_the_cursor_is_back() -> None:
    console = Console(width=80, height=24, file=io.StringIO(), force_terminal=True, _environ={})
    with LiveView("night-1", console) as view:
        for event in night():
            view.handle(event)
    assert isinstance(console.file, io.StringIO)
    end = console.file.getvalue()[-400:]
    assert end.rindex("\x1b[?25h") > end.rindex("\x1b[?25l") if "\x1b[?25l" in end else "\x1b[?25h" in end
    assert end.endswith("\x1b[1A\x1b[2K") or end.endswith("\x1b[2K"), "the last thing done is to erase it"
