"""A finished run, called again: what it says, and that the command it prints is one that starts."""

from __future__ import annotations

import io
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, List

import pytest
from rich.console import Console

from cluster.cli import read_config
from cluster.driver import run as driver
from cluster.driver.finished import FINISHED, finished_lines, growth, keep_data, keep_finished, read_finished
from cluster.driver.state import load_state, save_state
from cluster.storage.releases import Release, Releases, shards_fingerprint, write_shard
from nl_model.model import NestedLM
from pipelines.config.load import to_yaml
from pipelines.config.schema import BaseConfig, Config, RunSection
from pipelines.data.facts import data_facts
from pipelines.data.module import open_data
from pipelines.machine.state import Phase, RunState
from pipelines.report.page import read_summary

TEXT = "".join(f"Line {i} of a text about rivers, lamps and stones, number {i * i}.\n\n" for i in range(60))


class Done:
    """A run directory as a finished run leaves it, and the data it read."""

    def __init__(self, folder: Path, make_config: Callable[..., Config], model: NestedLM) -> None:
        self.data, self.run_dir = folder / "data", folder / "runs" / "mine"
        (self.run_dir / "checkpoints").mkdir(parents=True)
        self.data.mkdir()
        for name in ("aa", "no", "x [y], 'z'"):
            (self.data / f"{name}.txt").write_text(TEXT)
        stream = replace(make_config().stream, path=str(self.data), sources=[])
        self.cfg = make_config(
            run=RunSection(name="mine", root=str(folder / "runs")), stream=stream, base=BaseConfig(sources=["aa"])
        )
        (self.run_dir / "config.yaml").write_text(to_yaml(self.cfg))
        setting = open_data(self.cfg)
        keep_data(self.run_dir, data_facts(setting))
        releases = Releases(self.run_dir / "releases")
        tensors = {f"weight/{name}": p.detach() for name, p in model.named_parameters()}
        for number in (0, 1):
            shard = write_shard(releases.prepare(number), 0, 1, tensors)
            releases.publish(Release(number, None, number, 0, 0, 0, shards_fingerprint([shard]), [shard]))
        state = RunState(phase=Phase.FINISHED, live=1, tokens=4096)
        save_state(self.run_dir, state)
        (self.run_dir / "summary.json").write_text(json.dumps({"sources": setting.sources}))
        (self.run_dir / "report.html").write_text("")
        keep_finished(self.run_dir, state)

    def lines(self) -> List[str]:
        told = read_finished(self.run_dir)
        assert told is not None
        return finished_lines(self.cfg, self.run_dir, told, read_summary(self.run_dir)["sources"])

    def next_config(self) -> Config:
        """What the command that is shown asks for."""
        words = shlex.split(self.lines()[-1])
        assert words[:2] == ["circadian", "run"]
        return read_config(words[2:])


@pytest.fixture
def done(tmp_path: Path, make_config: Callable[..., Config], make_model: Callable[..., NestedLM]) -> Done:
    return Done(tmp_path, make_config, make_model(make_config().levels))


def test_a_finished_run_says_so_and_how_new_data_is_learned(done: Done) -> None:
    lines = done.lines()
    assert lines[1].startswith("run mine is finished (4,096 tokens, 2") and "new since" not in "\n".join(lines)
    assert "under a name of its own, here NEW" in lines[2]
    cfg = done.next_config()
    assert cfg.base.checkpoint == str(done.run_dir / "releases" / "000001") and cfg.run.name == "mine-2"
    assert cfg.base.sources == ["aa", "no", "x [y], 'z'"] and cfg.stream.sources == ["NEW"]
    assert (cfg.model, cfg.levels) == (done.cfg.model, done.cfg.levels)


def test_new_text_is_counted_and_the_command_learns_it(done: Done) -> None:
    (done.data / "news").mkdir()
    (done.data / "news" / "2025.txt").write_text(TEXT)
    (done.data / "no.txt").write_text(TEXT + TEXT)
    lines = done.lines()
    size = 2 * len(TEXT.encode())
    (line,) = [line for line in lines if line.startswith("new since it began")]
    assert line.startswith(f"new since it began: about {size:,} bytes, ") and line.endswith("documents in news, no")
    cfg = done.next_config()
    assert cfg.stream.sources == ["news", "no"] and cfg.base.sources == ["aa", "no", "x [y], 'z'"]
    setting = open_data(cfg)
    driver.check_checkpoint(cfg, Path(cfg.run.root) / cfg.run.name, setting.tokenizer)
    assert setting.stream().estimate_tokens() > 0


def test_text_that_is_gone_is_named(done: Done) -> None:
    (done.data / "no.txt").write_text(TEXT[:2000])
    assert [line for line in done.lines() if line == "less than when it began is in no"]
    (done.data / "aa.txt").unlink()
    assert [line for line in done.lines() if line.startswith("its data is not what it was: base.sources names 'aa'")]


def test_growth_is_counted_by_source(make_config: Callable[..., Config]) -> None:
    facts = data_facts(open_data(make_config()))
    held = {source.name: [source.documents, source.size] for source in facts.sources}
    assert growth(held, facts).sources == () and growth(held, facts).gone == ()
    before = {**held, "b": [held["b"][0] - 1, held["b"][1] - 200], "old": [3, 30]}
    del before["c"]
    found = growth(before, facts)
    assert found.sources == ("b", "c") and found.gone == ("old",)
    assert (found.documents, found.size) == (1 + held["c"][0], 200 + held["c"][1])


@pytest.mark.parametrize("change", ["rollback", "published", "phase", "marker", "summary"])
def test_what_has_something_left_to_do_is_not_finished(done: Done, change: str) -> None:
    assert read_finished(done.run_dir) is not None
    state = load_state(done.run_dir)
    if change == "rollback":
        state.live, state.rows = 0, [{"bpb": {}}]
    elif change == "phase":
        state.phase = Phase.REPORT
    elif change == "published":
        (done.run_dir / "releases" / "000002").mkdir()
        (done.run_dir / "releases" / "000002" / "STABLE").write_text("")
    elif change == "marker":
        (done.run_dir / FINISHED).unlink()
    else:
        (done.run_dir / "summary.json").unlink()
    save_state(done.run_dir, state)
    assert read_finished(done.run_dir) is None


def test_the_command_on_a_finished_run_starts_nothing(done: Done) -> None:
    """Nothing is written either: the summary stays that of the run, whatever lies in its folders by now."""
    summary: dict[str, Any] = {
        "strategy": "circadian", "sources": ["aa"], "mean_final_bpb": 2.0, "matrix": [[2.0]], "control": None,
        "controls": {}, "flops": {}, "rounds": [],
    }  # fmt: skip
    (done.run_dir / "summary.json").write_text(json.dumps(summary))
    before = {path: path.stat().st_mtime_ns for path in done.run_dir.rglob("*")}
    console = Console(file=io.StringIO(), width=200)
    assert driver.run(done.cfg, console) == 0
    assert isinstance(console.file, io.StringIO) and "run mine is finished (4,096 tokens" in console.file.getvalue()
    assert {path: path.stat().st_mtime_ns for path in done.run_dir.rglob("*")} == before
    assert not driver.ray.is_initialized()
