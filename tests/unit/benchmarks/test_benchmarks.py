"""Benchmarks: what they read off a journal and a run, how they write it down, and that README.md says the same."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch

from benchmarks import overhead, readme, results, store, wake
from benchmarks.tables import Machine, Spread, markdown_table
from pipelines.config.load import load_config, to_yaml
from pipelines.report.events import Event

TINY = ("model.dim=16", "model.context=16", "wake.batch=2", "sleep.batch=2", "levels.fast.period=32")
TINY_LEVELS = ("levels.medium.period=64", "levels.slow.period=128")
MACHINE = Machine("Some CPU @ 2.00GHz", 2, 7.5, "")


# -- the measurements ------------------------------------------------------------------------------------------------


def test_wake_measures_every_kind_of_step() -> None:
    cfg = load_config("smoke", [*TINY, *TINY_LEVELS])
    threads = torch.get_num_threads()
    figures = wake.measure(repeats=1, configs={"tiny": cfg})["tiny"]
    assert torch.get_num_threads() == threads
    assert (figures.step_tokens, figures.steps, figures.repeats) == (32, 2, 1)
    assert 0 < figures.learner_parameters < figures.parameters
    assert set(figures.costs) == {"plain", "wake", wake.ALONE, "sleep"}
    assert figures.costs["plain"].cpu_ratio == Spread(1.0, 1.0, 1.0)
    for cost in figures.costs.values():
        assert cost.cpu_ms.median > 0
        assert cost.tokens_per_s.median == pytest.approx(32_000 / cost.wall_ms.median)
    assert wake.render({"tiny": figures}).count("\n| wake | ") == 1


def test_a_wake_step_costs_less_and_a_sleep_step_more_in_flops() -> None:
    for cfg in wake.default_configs().values():
        ratios = wake.flops_ratios(cfg, 257)
        assert ratios["plain"] == ratios["sleep"] == 1 and ratios["wake"] < 0.6, "no guide reads along"
        guided = replace(cfg, sleep=replace(cfg.sleep, teacher=0.1, anchor=0.1))
        assert 1.2 < wake.flops_ratios(guided, 257)["sleep"] < 1.4


def test_nothing_is_measured_without_repeats() -> None:
    for measure in (wake.measure, overhead.measure):
        with pytest.raises(ValueError, match="repeats=0 must be at least 1"):
            measure(repeats=0)


def test_the_shorter_run_is_a_proper_configuration_of_the_default_model() -> None:
    cfg, default = load_config("default", overhead.shorter_run()), load_config("default")
    assert (cfg.model, cfg.levels, cfg.wake, cfg.sleep) == (default.model, default.levels, default.wake, default.sleep)
    assert cfg.stream.max_source_bytes == cfg.levels["slow"].period
    assert len(cfg.stream.sources) == overhead.SOURCES


def wake_event(begin: float, end: float, rate: float) -> Event:
    return {"event": "wake", "t": end, "seconds": end - begin, "tokens_per_second": rate}


def make_journal() -> List[Event]:
    """Six calls of the learner: warming up, alone, straddling a start, beside, straddling an end, alone."""
    return [
        wake_event(0, 9, 1.0),
        wake_event(9, 10, 200.0),
        {"event": "round_started", "t": 10.5, "round": 1},
        wake_event(10, 11, 2.0),
        wake_event(11, 12, 90.0),
        {"event": "round_finished", "t": 12.5, "round": 1},
        wake_event(12, 13, 3.0),
        wake_event(13, 14, 210.0),
    ]


def test_calls_of_the_learner_count_where_the_pool_did_one_thing_throughout() -> None:
    assert overhead.wake_rates(make_journal()) == ([200.0, 210.0], [90.0])


def make_run(directory: Path, **fields: Any) -> Path:
    """A run directory with what the benchmarks read."""
    directory.mkdir()
    (directory / "summary.json").write_text(json.dumps({**make_summary(), **fields}))
    (directory / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in make_journal()))
    (directory / "config.yaml").write_text(to_yaml(load_config("default", ["run.seed=3", "run.root=elsewhere"])))
    return directory


def test_runs_become_one_table(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", system_overhead=0.06)
    figures = overhead.read_runs([first, second], "circadian run x=1")
    assert figures.runs == 2 and figures.tokens == 1_310_720 and figures.rounds == 2
    assert figures.system_overhead == Spread(0.05, 0.04, 0.06)
    assert (figures.alone, figures.beside) == (Spread(205.0, 200.0, 210.0), Spread(90.0, 90.0, 90.0))
    text = overhead.render(figures)
    assert "`circadian run x=1`: 2 runs of 1,310,720 tokens and 2 rounds" in text
    assert "| 5.0% (4.0% .. 6.0%) |" in text


# -- tables ------------------------------------------------------------------------------------------------------------


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of_ratios([4.0, 9.0], [2.0, 3.0]) == Spread(2.5, 2.0, 3.0)
    assert Spread(1234.5, 0.25, 5000.0).show(",.1f") == "1,234.5 (0.2 .. 5,000.0)"
    assert Spread.of([2.0]).show(".1f") == "2.0"
    with pytest.raises(ValueError, match="at least one measurement"):
        Spread.of([])


def test_markdown_table_keeps_its_columns() -> None:
    assert markdown_table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"


def test_machine() -> None:
    assert MACHINE.show() == "Some CPU @ 2.00GHz, 2 cores, 7.5 GiB of memory, no GPU"
    here = Machine.here()
    assert here.cpu and here.cores >= 1 and here.memory_gib > 0


# -- RESULTS.md --------------------------------------------------------------------------------------------------------


def make_cost(ratio: float, flops: float) -> wake.Cost:
    """Of a step that takes `ratio` of 100 ms, give or take a tenth."""
    milliseconds, ratios = (Spread(scale * ratio, 0.9 * scale * ratio, 1.1 * scale * ratio) for scale in (100, 1))
    return wake.Cost(milliseconds, milliseconds, Spread.of([2e4 / ratio]), ratios, Spread.of([1 / ratio]), flops)


def make_measured(tmp_path: Path) -> results.Measured:
    costs = {"plain": make_cost(1.0, 1.0), "wake": make_cost(0.5, 0.44), "sleep": make_cost(1.3, 1.33)}
    steps = {"default": wake.StepFigures(565_440, 73_728, 2048, 4, 7, costs)}
    names = (results.APPENDED, results.FLOOR, results.SAMPLED, results.DATASET)
    stored: Dict[str, store.Figures] = {
        name: {"rows_per_s": 1e4, "min": 9e3, "max": 1.1e4, "ratio": k, "ratio_min": k - 0.5, "ratio_max": k + 0.5}
        for k, name in enumerate(names, start=1)
    }
    run = overhead.read_runs([make_run(tmp_path / "measured")], "circadian run x=1")
    return results.Measured(steps, stored, run)


def test_the_shipped_pages_are_those_that_are_kept() -> None:
    text = results.RESULTS.read_text()
    assert "## Sleep on ranks\n" in text and results.with_pages(text) == text


def test_pages_follow_what_was_measured(tmp_path: Path) -> None:
    (tmp_path / "gate.md").write_text("new page\n")
    old = "# Benchmarks\n\nfigures\n\n## Memory probes\n\nold page\n"
    assert results.with_pages(old, tmp_path) == (
        "# Benchmarks\n\nfigures\n\n## The gate against planted candidates\n\nnew page\n"
    )


def test_a_page_names_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/here/benchmarks/sleep.py", "--ranks", "4", "run.name=a night"])
    results.keep_page(tmp_path / "sleep.json", "figures")
    about, body = (tmp_path / "sleep.md").read_text().split("\n\n")
    assert about.startswith("Made by `python -m benchmarks.sleep --ranks 4 'run.name=a night'` on ")
    assert body == "figures\n"
    results.keep_page(tmp_path / "sleep.json", "figures", "several commands")
    assert (tmp_path / "sleep.md").read_text().startswith("Made by `several commands` on ")


def test_results_hold_every_figure_and_what_they_depend_on(tmp_path: Path) -> None:
    made_with = {"python": "3.11", "torch": "2"}
    about = results.Circumstances("python -m x", "2026-01-02 03:04 UTC", MACHINE, 0.25, made_with)
    text = results.render(make_measured(tmp_path), about)
    for part in (
        "Written by `python -m x` on 2026-01-02 03:04 UTC",
        "* machine: Some CPU @ 2.00GHz, 2 cores, 7.5 GiB of memory, no GPU",
        "* load before the start: 0.25",
        "* versions: python 3.11, torch 2",
        "| wake | 50.0 (45.0 .. 55.0) |",
        f"| {results.DATASET} | 10,000 (9,000 .. 11,000) | 4.00 (3.50 .. 4.50) |",
        "| system overhead: learner's time outside wake steps | 4.0% |",
    ):
        assert part in text


def test_the_summary_takes_ratios_from_the_way_the_store_is_held_against(tmp_path: Path) -> None:
    lines = results.summary(make_measured(tmp_path)).splitlines()
    assert len(lines) == 4 and all(line.startswith("* ") for line in lines)
    assert "takes 0.50 (0.45 .. 0.55) of a plain training step's CPU time and 0.44 of its FLOPs" in lines[0]
    assert "2.00 (1.50 .. 2.50) times what pyarrow does with the same fsyncs" in lines[1]
    assert "4.0 (3.5 .. 4.5) times pyarrow's" in lines[2]
    assert "205 (200 .. 210) tokens/s with the pool at rest, 90 with the pool asleep" in lines[3]


def test_the_store_still_measures_what_the_summary_names() -> None:
    source = Path(store.__file__).read_text(encoding="utf-8")
    for name in (results.APPENDED, results.FLOOR, results.SAMPLED, results.DATASET):
        assert f'"{name}":' in source


# -- README.md ---------------------------------------------------------------------------------------------------------


def make_summary() -> Dict[str, Any]:
    control = {"matrix": [[3.0, 6.0], [3.6, 2.4]], "mean_final_bpb": 3.0, "forgetting": 0.6, "learning": 2.4}
    tried = [{"learning_rate": rate} for rate in (5e-4, 2e-3, 4e-3)]
    more = {"backward_transfer": -0.6, "learning_rate": 2e-3, "tried": tried, "edge": False, "flops": 1.9e13}
    replay = {**control, **more}
    return {
        "run": "default",
        "sources": ["docs", "cpp"],
        "base_sources": ["docs"],
        "matrix": [[3.0, 6.0], [3.1, 2.5]],
        "mean_final_bpb": 2.8,
        "forgetting": 0.1,
        "backward_transfer": -0.1,
        "learning": 2.5,
        "control": {"strategy": "replay", **replay},
        "controls": {"replay": replay, "naive": {**replay, "mean_final_bpb": 4.0, "tried": tried[:1], "edge": True}},
        "rounds": [{"decision": "promoted"}, {"decision": "rejected"}],
        "tokens_streamed": 1_310_720,
        "wake_tokens_per_second": 19876.5,
        "system_overhead": 0.04,
        "log_wait_share": 0.1,
        "experiences": {"committed": 5120, "duplicates": 0, "lost": 0},
        "flops": {"total": 2e13, "control": 7e13},
        "stream_cursor": {"key": 5120},
        "quarantined": [["cpp", "somewhere/a.h", "not UTF-8"]],
        "seconds": {"base": 30.0, "stream": 185.0, "control": 90.0, "report": 1.0},
        "versions": {"python": "3.11"},
    }


README = """# R

<!-- results:start -->
old
<!-- results:end -->

text

<!-- bench:start -->
<!-- bench:end -->
end
"""
RESULTS = f"# Benchmarks\n\n{results.SUMMARY}\n\n* one\n* two\n\n## Steps\n\n* three\n"


def test_a_run_is_kept_without_what_is_long_or_names_files(tmp_path: Path) -> None:
    kept = readme.keep(make_run(tmp_path / "run"))
    assert set(make_summary()) - set(kept) == {"stream_cursor", "quarantined"}
    assert kept["made"]["command"] == "circadian run default run.seed=3"
    assert Machine(**kept["made"]["machine"]) == Machine.here()


def test_the_command_gives_the_configuration_back(tmp_path: Path) -> None:
    words = [
        "run.name=b",
        "stream.sources=[cpp,fonts]",
        "control.enabled=false",
        "levels.fast.width=64",
        "base.lr=0.01",
    ]
    wanted = load_config("default", words)
    (tmp_path / "config.yaml").write_text(to_yaml(wanted))
    command = readme.command_of(tmp_path).split()
    assert command[:3] == ["circadian", "run", "default"] and "control.enabled=false" in command
    assert load_config(command[2], command[3:]) == wanted


def test_the_command_starts_from_the_nearest_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(load_config("smoke", ["run.name=second"])))
    assert readme.command_of(tmp_path) == "circadian run smoke run.name=second"


def test_a_run_with_other_levels_is_refused(tmp_path: Path) -> None:
    cfg = load_config("default")
    (tmp_path / "config.yaml").write_text(to_yaml(replace(cfg, levels={**cfg.levels, "glacial": cfg.levels["slow"]})))
    with pytest.raises(ValueError, match="glacial"):
        readme.command_of(tmp_path)


def test_the_table_of_a_run(tmp_path: Path) -> None:
    text = readme.render_results(readme.keep(make_run(tmp_path / "run")))
    for part in (
        "|  | Circadian | replay | naive |",
        "| Mean final bits per byte | **2.800** | 3.000 | 4.000 |",
        "| Forgetting | **0.100** | 0.600 | 0.600 |",
        "| final, `docs` (base) | **3.100** | 3.600 | 3.600 |",
        "| Training FLOPs | 20 TFLOP | 19 TFLOP | 19 TFLOP |",
        "1,310,720 tokens streamed, each once; 5,120 experiences committed, 0 lost, 0 twice.",
        "2 consolidation rounds, 1 promoted.",
        "System overhead 4.0% of the learner's time; 19,876 tokens/s inside wake steps.",
        "Wall time: base 30.0 s, stream 3 min 5 s, control 1 min 30 s.",
        "Control `replay`: the same base and order, step size 0.002, the best of 3 by its own final mean.",
        "Control `naive`: the same base and order, step size 0.002 (at the edge of what was tried).",
        "Made by `circadian run default run.seed=3`, then `python -m benchmarks.readme runs/default`.",
    ):
        assert part in text


def test_online_loss_of_a_run_with_recall_and_without(tmp_path: Path) -> None:
    kept = readme.keep(make_run(tmp_path / "run"))
    assert "Online" not in readme.render_results(kept)
    alone = readme.render_results({**kept, "online_bpb": 3.4567, "recalled_bpb": None})
    assert "before it is learned from: 3.457 bits per byte." in alone
    both = readme.render_results({**kept, "online_bpb": 3.4567, "recalled_bpb": 2.3456})
    assert "before it is learned from: 3.457 bits per byte, 2.346 read together with recall." in both


def test_a_run_without_a_control_has_a_table_too(tmp_path: Path) -> None:
    text = readme.render_results(readme.keep(make_run(tmp_path / "run", control=None, controls={})))
    assert "| Mean final bits per byte | 2.800 | \N{EN DASH} |" in text and "step size" not in text


def test_the_summary_of_the_results_is_repeated_to_its_end_and_no_further() -> None:
    assert readme.render_bench(RESULTS) == "* one\n* two"
    for broken in ("# Benchmarks\n", f"{results.SUMMARY}\n\n## Steps\n"):
        with pytest.raises(ValueError, match="make bench"):
            readme.render_bench(broken)


def test_only_what_lies_between_the_markers_changes() -> None:
    assert readme.fill("a <!-- x:start -->b<!-- x:end --> c", "x", "new") == (
        "a <!-- x:start -->\nnew\n<!-- x:end --> c"
    )
    start, end = "<!-- x:start -->", "<!-- x:end -->"
    for broken in ("", start, end, end + start, start + start + end, start + end + end):
        with pytest.raises(ValueError, match="x:start"):
            readme.fill(broken, "x", "new")


def test_runs_of_several_strategies_have_a_row_each() -> None:
    look = {"tokens": 8, "release": 1, "served": 3.0, "rested": 3.1}
    one = {
        "strategy": "circadian", "seed": 1, "final": 3.0, "area": 3.2, "gap": -0.1, "online": 3.5, "recalled": 2.5,
        "epochs": 2.0, "rounds": 4, "promoted": 3, "seconds": 9.0, "finals": {"a": 3.0}, "looks": [look],
    }  # fmt: skip
    runs = [one, {**one, "seed": 2, "final": 3.2}, {**one, "strategy": "replay", "recalled": None}]
    text = readme.render_real({"runs": runs, "command": "python -m x", "machine": "a machine"})
    assert "| `circadian` | 3.100 (3.000 .. 3.200) | 3.200 (3.200 .. 3.200) |" in text
    assert "| `replay` | 3.000 (3.000 .. 3.000) |" in text and "6 of 8" in text and "`python -m x` on a machine" in text


def test_writing_makes_the_readme_up_to_date_and_every_change_shows(tmp_path: Path) -> None:
    page, kept, bench = tmp_path / "README.md", tmp_path / "results" / "kept.json", tmp_path / "RESULTS.md"
    page.write_text(README)
    bench.write_text(RESULTS)
    readme.write(make_run(tmp_path / "run"), page, kept, bench)
    assert readme.difference(page, kept, bench) == ""
    written = page.read_text()
    assert written.startswith("# R\n") and written.endswith("end\n") and "\ntext\n" in written and "old" not in written

    page.write_text(written.replace("2.800", "2.700"))
    assert "-| Mean final bits per byte | **2.700**" in readme.difference(page, kept, bench)
    bench.write_text(RESULTS.replace("* one", "* other"))
    readme.write(None, page, kept, bench)
    assert "* other" in page.read_text() and readme.difference(page, kept, bench) == ""


def test_nothing_is_written_where_a_marker_is_missing(tmp_path: Path) -> None:
    page, kept, bench = tmp_path / "README.md", tmp_path / "kept.json", tmp_path / "RESULTS.md"
    page.write_text(README.replace("<!-- bench:end -->", ""))
    bench.write_text(RESULTS)
    with pytest.raises(ValueError, match="bench:end"):
        readme.write(make_run(tmp_path / "run"), page, kept, bench)
    assert not kept.exists() and "old" in page.read_text()


def test_the_readme_says_what_was_measured() -> None:
    assert readme.difference() + readme.difference(readme.MODEL_PAGE) == "", "run: python -m benchmarks.readme"
