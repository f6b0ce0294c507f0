"""Report and plots, on a synthetic run that forgets and sleeps like a real one."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from pipelines.gate.report import awake_rows
from pipelines.report.events import Event, Timeline, build_timeline, describe_round, short_number
from pipelines.report.looks import LookPoint, look_points, look_rows
from pipelines.report.page import (
    headline,
    read_summary,
    render_summary_table,
    source_lines,
    write_report,
)
from pipelines.report.plots import level_writes, matrix, rounds, save, smooth, write_plots
from pipelines.report.sides import sides
from pipelines.report.words import bits, duration, flop

BASE = ["english", "markdown"]
STREAM = ["python", "cpp", "german", "latex"]
STEP = 2048
DASH = "\N{EN DASH}"
PNGS = ("online_loss", "awake", "matrix", "level_writes", "rounds", "surprise")


def figures(source: str, worst: float, mean: float) -> dict[str, Any]:
    return {
        "seen": [source],
        "candidate": {source: 2.1},
        "anchor": {source: 2.4},
        "awake": {source: 2.2},
        "worst": {"source": source, "loss": worst},
        "mean_change": mean,
    }


def make_events(steps_per_source: int = 160, seed: int = 0) -> list[Event]:
    """The journal of one run: four sources in a row, a round at the end of each (one is rejected), one crash."""
    rng = np.random.default_rng(seed)
    t = 1_700_000_000.0
    levels = {
        "fast": {"period": 2048, "owner": "learner"},
        "medium": {"period": 8192, "owner": "learner"},
        "slow": {"period": steps_per_source * STEP, "owner": "pool"},
    }
    total = len(STREAM) * steps_per_source * STEP
    start = {"event": "run_started", "sources": STREAM, "base_sources": BASE, "stream_tokens": total, "levels": levels}
    events: list[Event] = [{"t": t, **start, "resumed": False}]
    events.append({"t": t + 4, "event": "base_finished", "origin": "pretrained", "tokens": 524288, "seconds": 4.0})
    events.append({"t": t + 4, "event": "quarantined", "source": "cpp", "origin": "b/<x>.cpp:1", "reason": "not UTF-8"})
    t, tokens, release, promoted = t + 4, 0, 0, 0
    for number, source in enumerate(STREAM, start=1):
        for block in range(0, steps_per_source, 8):
            steps = []
            for index in range(block, min(block + 8, steps_per_source)):
                tokens += STEP
                bpb = 2.1 + 0.2 * number + 1.9 * float(np.exp(-index / 25)) + float(rng.normal(0, 0.12))
                written = ["fast"] + ["medium"] * (tokens % 8192 == 0)
                steps.append(
                    {
                        "tokens": tokens,
                        "bpb": {source: bpb},
                        "surprise": {source: bpb * 0.693},
                        "written": written,
                        "seconds": 0.1,
                    }
                )
            t += 0.8
            events.append(
                {
                    "t": t,
                    "event": "wake",
                    "tokens": tokens,
                    "seconds": 0.8,
                    "steps": steps,
                    "tokens_per_second": 20480.0,
                    "release": release,
                }
            )
            if promoted > release and block >= steps_per_source // 2:
                release = promoted
                events.append({"t": t, "event": "adopted", "release": release, "tokens": tokens})
        if number == 2:
            events.append({"t": t, "event": "failure", "part": "pool", "error": "rank 1 died", "restarts_left": 2})
            t += 9000
            events.append({"t": t, **start, "resumed": True})
        events.append({"t": t, "event": "round_queued", "round": number, "snapshot": 40 * number, "tokens": tokens})
        events.append(
            {
                "t": t + 1,
                "event": "round_started",
                "round": number,
                "snapshot": 40 * number,
                "anchor": release,
                "steps": 120,
                "ranks": 2,
                "zero_stage": 2,
            }
        )
        events.append({"t": t + 5, "event": "round_progress", "round": number, "step": 60, "steps": 120, "loss": 1.9})
        decision, worst, mean = ("rejected", 0.31, 0.09) if number == 3 else ("promoted", 0.04, -0.31)
        promoted += decision == "promoted"
        events.append({"t": t + 7, "event": "round_finished", "round": number, "steps": 120, "seconds": 6.0})
        gate = {"round": number, "decision": decision, "release": promoted, "reason": ""}
        events.append({"t": t + 7.5, "event": "gate", **gate, "figures": figures(source, worst, mean)})
        scores = {"served": {"english": 2.5, source: 3.0}, "rested": {"english": 2.0, source: 3.25, "new": None}}
        events.append({"t": t + 7.6, "event": "look", "tokens": tokens, "release": release, **scores})
    events.append({"t": t + 8, "event": "adopted", "release": promoted, "tokens": tokens})
    events.append({"t": t + 9, "event": "finished", "seconds": 9.0})
    return sorted(events, key=lambda event: event["t"])


def make_summary(rounds: int = 4, control: bool = True, seed: int = 0) -> dict[str, Any]:
    """Figures of a run in which Circadian keeps what the control forgets."""
    rng = np.random.default_rng(seed)
    sources = BASE + STREAM

    def side(kept: float) -> dict[str, Any]:
        table = np.full((rounds + 1, len(sources)), 4.2)
        table[:, :2] = 2.3
        for row in range(1, rounds + 1):
            table[row] = table[row - 1] + kept * (table[row - 1] < 4)
            table[row, row + 1] = 2.2
        table += rng.normal(0, 0.03, table.shape)
        rows = [
            {"release": i, "tokens": i * 327680, "label": "base" if i == 0 else f"after {STREAM[i - 1]}"}
            for i in range(rounds + 1)
        ]
        return {
            "matrix": table.tolist(),
            "rows": rows,
            "mean_final_bpb": float(table[-1].mean()),
            "forgetting": kept * rounds / 2,
            "backward_transfer": -kept * rounds / 2,
            "learning": 2.2,
        }

    summary = {**side(0.08), "sources": sources, "base_sources": BASE, "stream_sources": STREAM}
    summary |= {"tokens_streamed": 1310720, "wake_tokens_per_second": 21400.0}
    summary["control"], summary["controls"] = None, {}
    if control:
        tried = [
            {"learning_rate": rate, "mean_final_bpb": 3.1, "learning": 2.2, "forgetting": 0.6} for rate in (5e-4, 2e-3)
        ]
        replay = {**side(0.2), "learning_rate": 1e-3, "tried": tried, "edge": False, "flops": 9.3e14}
        naive = {**side(0.35), "learning_rate": 2e-3, "tried": tried, "edge": True, "flops": 9.2e14}
        summary["controls"] = {"replay": replay, "naive": naive}
        summary["control"] = {"strategy": "replay", **replay}
    summary["rounds"] = [
        {
            "id": i,
            "snapshot": 40 * i,
            "release": None if i == 3 else i,
            "steps": 120,
            "seconds": 6.0 * i,
            "decision": "rejected" if i == 3 else "promoted",
            "figures": figures("python", 0.04, -0.31),
        }
        for i in range(1, rounds + 1)
    ]
    summary["flops"] = {"wake": 4.1e14, "sleep": 5.3e14, "total": 9.4e14, "control": 5.6e15, "probe": 2e13}
    summary["experiences"] = {"committed": 5120, "duplicates": 0, "lost": 0, "base": 2048, "quarantined": 1}
    summary |= {"system_overhead": 0.062, "stream_cursor": {}, "versions": {"circadian": "0.1.0", "torch": "2.13.0"}}
    summary["seconds"] = {"base": 21.5, "stream": 190.2, "control": 95.0, "total": 4310.0}
    return summary


def make_run(folder: Path, events: list[Event], summary: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text("run:\n  name: <script>alert(1)</script>\n")
    return folder


def test_the_report_is_one_page_that_needs_nothing_else(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "night", make_events(24), make_summary())
    page = write_report(run_dir).read_text()
    links = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(links) == len(PNGS) and all(link.startswith("data:image/png;base64,") for link in links)
    assert "url(" not in page and "@import" not in page and "<script" not in page
    for name in PNGS:
        height, width = imread(run_dir / f"{name}.png").shape[:2]
        assert 300 < height < 3000 and 1000 < width < 3000
    for text in (
        "rejected: mean -0.31 bpb, worst python +0.04",
        "circadian run config.yaml run.name=night-again",
        "&lt;script&gt;alert(1)",
        "not UTF-8",
        "b/&lt;x&gt;.cpp:1",
        "940 TFLOP",
        "930 TFLOP",
        '<th class="number">Circadian</th><th class="number">replay</th><th class="number">naive</th>',
        "naive: step size 0.002, best at the edge of what was tried; tried, with their final means: 0.0005 (3.100)",
        "replay: step size 0.001; tried",
        '<td class="number">2.750</td><td class="number">2.625</td><td class="number">+0.125</td>',
        "awake against release",
        "2.13.0",
        "rank 1 died",
    ):
        assert text in page


def test_the_same_run_gives_the_same_picture_byte_for_byte(tmp_path: Path) -> None:
    timeline = build_timeline(make_events(8))
    first, second = (save(rounds(timeline), tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second


@pytest.mark.parametrize("count", [0, 3, 40])
def test_a_short_or_broken_off_journal_still_gives_a_report(tmp_path: Path, count: int) -> None:
    run_dir = make_run(tmp_path / "night", make_events(8)[:count], make_summary(rounds=0, control=False))
    page = write_report(run_dir).read_text()
    assert "No control was trained" in page and "No round has ended yet" in page


def test_one_step_and_a_summary_with_only_the_first_keys(tmp_path: Path) -> None:
    events = make_events(1)[:4]
    write_report(make_run(tmp_path / "night", events, {"sources": ["a"], "matrix": [[None]], "rows": []}))


def test_many_rows_sources_and_rounds_stay_drawable(tmp_path: Path) -> None:
    sources = [f"source-{i}" for i in range(14)]
    rows = [{"release": i, "tokens": i, "label": f"release {i}"} for i in range(90)]
    summary = {"sources": sources, "matrix": np.ones((90, 14)).tolist(), "rows": rows, "control": None}
    labels = [text.get_text() for text in matrix(summary).axes[0].get_yticklabels()]
    assert labels[0] == "release 0" and labels[-1] == "release 89" and len(labels) == 32
    events = [{"t": 1.0 * i, "event": "round_queued", "round": i} for i in range(1, 60)]
    write_plots(build_timeline(events), summary, tmp_path)


def test_matrix_cells_and_colours_are_those_of_the_summary() -> None:
    summary = {
        "sources": ["a", "b"],
        "rows": [{"label": "base"}, {"label": "end"}],
        "matrix": [[4.0, 3.0], [2.0, None]],
        "control": {"rows": [{"label": "end"}], "matrix": [[6.0, 1.0]]},
    }
    left, right, _ = matrix(summary).axes
    assert [axes.get_title(loc="left") for axes in (left, right)] == ["Circadian", "control"], "as older runs have it"
    assert [text.get_text() for text in left.texts] == ["4.00", "3.00", "3.50", "2.00"]
    assert [text.get_text() for text in right.texts] == ["6.00", "1.00", "3.50"]
    assert left.images[0].get_clim() == right.images[0].get_clim() == (1.0, 6.0)


def test_a_missing_or_broken_summary_is_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"summary\.json does not exist; run the stream"):
        write_report(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(ValueError, match=r"summary\.json .*delete it and run"):
            read_summary(tmp_path)


def test_the_better_side_is_marked_and_equal_sides_are_not() -> None:
    summary = {
        "sources": ["a", "b", "c"],
        "matrix": [[9, 9, 9], [1.0, 2.0, 3.00001]],
        "forgetting": 0.5,
        "learning": 2.0,
        "mean_final_bpb": 2.0,
        "control": {"matrix": [[2.0, 1.0, 3.0]], "mean_final_bpb": 2.5, "forgetting": 0.1},
    }
    assert [line.best for line in source_lines(summary)] == [0, 1, -1]
    assert [line.best for line in headline(summary)[:3]] == [0, 1, -1]
    transfer = {"backward_transfer": -0.5, "forgetting": float("nan")}
    lines = headline({**transfer, "control": {"backward_transfer": -0.1, "forgetting": 1.0}})
    assert [line.best for line in lines] == [-1, -1, -1, 1, -1]
    assert [line.cells[1] for line in headline(summary)[:3]] == ["2.500", "0.100", DASH]


def test_of_several_controls_the_best_side_is_marked_unless_another_reads_the_same() -> None:
    means = {"replay": 2.0, "naive": 3.0, "reading": math.nan}
    summary = {"mean_final_bpb": 2.5, "controls": {name: {"mean_final_bpb": mean} for name, mean in means.items()}}
    assert [name for name, _ in sides(summary)] == ["Circadian", "replay", "naive", "reading"]
    line = headline(summary)[0]
    assert (line.cells, line.best) == (("2.500", "2.000", "3.000", DASH), 1)
    assert headline({**summary, "mean_final_bpb": 2.0001})[0].best == -1
    assert headline({**summary, "mean_final_bpb": 1.0})[0].best == 0
    assert sides({"strategy": "reading"})[0][0] == "this run (reading)"


def test_the_terminal_table_holds_all_sides() -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    summary = make_summary()
    summary["sources"][0] = "[red]odd"
    console.print(render_summary_table(summary))
    text = console.export_text()
    for side in (summary, *summary["controls"].values()):
        assert f"{side['mean_final_bpb']:.3f}" in text
    for part in ("Circadian", "replay", "naive", "940 TFLOP", "latex", "[red]odd", "best at the edge of"):
        assert part in text


def test_looks_are_means_over_the_sources_that_both_models_were_measured_on() -> None:
    looks = [
        {"tokens": 8, "release": 1, "served": {"a": 2.0, "b": 4.0}, "rested": {"a": 1.0, "b": 3.0}},
        {"tokens": 9, "release": 1, "served": {"a": 2.0, "b": None, "c": 3.0}, "rested": {"a": 2.5, "b": 3.0}},
        {"tokens": 10, "served": {"a": None}, "rested": {"a": 1.0}},
    ]
    assert look_points(looks) == [LookPoint(8, 1, 2, 3.0, 2.0), LookPoint(9, 1, 1, 2.0, 2.5)]
    many = build_timeline([{"t": 0.0, "event": "look", **looks[0], "tokens": n} for n in range(99, -1, -1)])
    rows = look_rows(many)
    assert len(rows) == 24 and (rows[0]["tokens"], rows[-1]["tokens"]) == ("0", "99")
    assert rows[0]["change"] == "+1.000" and look_rows(Timeline()) == []
    twice = build_timeline([{"t": 0.0, "event": "look", **looks[0]}, {"t": 1.0, "event": "look", **looks[0]}])
    assert len(twice.looks) == 1, "a replay after a restart looks again"


def test_the_gates_awake_rows_are_means_over_the_recent_sources() -> None:
    figures = {
        "recent": ["a", "b"],
        "anchor": {"a": 2.0, "b": 4.0, "later": 9.0},
        "awake": {"a": 1.0, "b": 4.0, "later": 9.0},
        "candidate": {"a": 1.0, "b": 2.0, "later": 9.0},
    }
    summary = {"rounds": [{"id": 1, "figures": figures}, {"id": 2, "figures": {}}, {"id": 3}]}
    row = {"id": "1", "anchor": "3.000", "awake": "2.500", "candidate": "1.500", "change": "-0.500"}
    assert awake_rows(summary) == [row]


def test_numbers_read_well() -> None:
    assert [short_number(value) for value in (0, 999, 21_400, 1.234e6)] == ["0", "999", "21.4k", "1.23M"]
    assert [flop(value) for value in (9.4e14, 3e22, None, 12.0)] == ["940 TFLOP", "3e+22 FLOP", DASH, "12 FLOP"]
    assert [duration(value) for value in (4.04, 185, 8040, None)] == ["4.0 s", "3 min 5 s", "2 h 14 min", DASH]
    assert describe_round("promoted", {}) == "promoted" and describe_round(None, {"mean_change": 1.0}) == ""
    assert describe_round("rejected", figures("cpp", 0.3, 0.1)) == "rejected: mean +0.10 bpb, worst cpp +0.30"


def test_smoothing_keeps_length_mean_and_ends() -> None:
    values = np.array([0.0, 3.0, 6.0, 9.0])
    assert smooth(values, 0).tolist() == values.tolist()
    assert smooth(values, 1).tolist() == [1.5, 3.0, 6.0, 7.5]
    assert smooth(np.ones(1), 5).tolist() == [1.0]


def test_an_empty_timeline_draws(tmp_path: Path) -> None:
    assert set(write_plots(Timeline(), {}, tmp_path)) == set(PNGS)


def test_the_raster_counts_every_write_and_the_adoptions() -> None:
    timeline = build_timeline(make_events(160))
    axes = level_writes(timeline).axes[0]
    assert [text.get_text() for text in axes.texts[:3]] == ["640", "160", "3"]
    assert [label.get_text().split()[0] for label in axes.get_yticklabels()] == ["fast", "medium", "slow"]


def test_rounds_carry_decision_and_figures() -> None:
    axes = rounds(build_timeline(make_events(8))).axes[0]
    assert [text.get_text() for text in axes.texts][2:] == [
        "rejected: mean +0.09 bpb, worst german +0.31",
        "promoted: mean -0.31 bpb, worst latex +0.04",
    ]


def test_the_gates_figures_stand_in_the_page(tmp_path: Path) -> None:
    from pipelines.gate.report import gate_rows

    loss = {"recent_change": {"mean": -0.5, "low": -0.75, "high": -0.25}}
    worst = {"source": "cpp", "mean": 0.3, "low": 0.2, "high": 0.4}
    checks = [
        {"name": "loss", "passed": True, "reason": "", "figures": loss},
        {"name": "forgetting", "passed": False, "reason": "forgets cpp", "figures": {"worst": worst}},
    ]
    rounds = [{"id": 1}, {"id": 2, "figures": {"checks": checks}, "recent_scale": 0.5, "lr_scale": 0.5}]
    (row,) = gate_rows({"rounds": rounds})
    assert (row["id"], row["failed"], row["recent"]) == ("2", "forgetting", "-0.500 (-0.750 .. -0.250)")
    assert row["worst"] == "cpp +0.300 (+0.200 .. +0.400)" and row["plan"] == "recent x 0.5, step size x 0.5"
    assert row["awake"] == row["divergence"] == "\N{EN DASH}"
    (tmp_path / "summary.json").write_text(json.dumps({"rounds": rounds}))
    assert "cpp +0.300 (+0.200 .. +0.400)" in write_report(tmp_path).read_text()


def test_recall_is_shown_where_there_is_recall(tmp_path: Path) -> None:
    events = make_events(16)
    plain = write_report(make_run(tmp_path / "plain", events, make_summary())).read_text()
    assert "read with recall" not in plain
    for event in events:
        for one in event["steps"] if event["event"] == "wake" else ():
            one |= {"bytes": dict.fromkeys(one["bpb"], STEP), "recalled": {s: v / 2 for s, v in one["bpb"].items()}}
    page = write_report(make_run(tmp_path / "recall", events, make_summary())).read_text()
    read = build_timeline(events).read
    assert read.bpb is not None and read.recalled_bpb == pytest.approx(read.bpb / 2)
    for figure, words in ((read.bpb, "weights alone"), (read.recalled_bpb, "read with recall")):
        assert f"<b>{bits(figure)}</b><span>online bits per byte, {words}</span>" in page
    assert (tmp_path / "plain/online_loss.png").read_bytes() != (tmp_path / "recall/online_loss.png").read_bytes()
