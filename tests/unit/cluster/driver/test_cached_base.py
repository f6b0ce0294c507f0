"""Release 0: a cached base serves runs of every strategy, and one run alone makes it."""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path
from typing import List

import pytest
import torch

from cluster.driver.base_release import _alone, _publish, _take
from cluster.storage.releases import Releases, load_release
from nl_model.model import NestedLM
from pipelines.config.load import load_config
from pipelines.config.schema import Config
from pipelines.data.module import DataModule, open_data
from pipelines.wake.writes import learner_writes


@cache
def opened(strategy: str) -> tuple[Config, DataModule]:
    cfg = load_config("smoke", [f"strategy={strategy}", "stream.max_source_bytes=12288"])
    return cfg, open_data(cfg)


@pytest.mark.parametrize("maker", ["circadian", "reading", "replay"])
@pytest.mark.parametrize("taker", ["circadian", "reading", "replay"])
def test_a_base_serves_runs_of_every_strategy(maker: str, taker: str, tmp_path: Path) -> None:
    """A release's offsets are those of what the learner writes; rounds of another layout would all be rejected."""
    cfg, setting = opened(maker)
    model = NestedLM(cfg.model, cfg.levels, setting.tokenizer.vocab_size).reset_parameters(3)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    kept, releases = Releases(tmp_path / "kept"), Releases(tmp_path / "run")
    _publish(cfg, setting, kept, weights, "pretrained")

    cfg, setting = opened(taker)
    _take(cfg, setting, kept, releases)
    taken = load_release(releases.directory(0))
    model = NestedLM(cfg.model, cfg.levels, setting.tokenizer.vocab_size)
    offsets = {f"offset/{name}" for name in learner_writes(model, cfg)}
    assert taken.keys() == {f"weight/{name}" for name in weights} | offsets
    assert all(torch.equal(taken[f"weight/{name}"], weight) for name, weight in weights.items())
    assert not any(taken[name].any() for name in offsets)


def test_runs_that_start_side_by_side_make_a_base_one_after_the_other(tmp_path: Path) -> None:
    told: List[str] = []
    inside = threading.Event()

    def second() -> None:
        inside.wait(10)
        with _alone(tmp_path):
            told.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with _alone(tmp_path):
        inside.set()
        thread.join(0.2)
        told.append("first")
    thread.join(10)
    assert told == ["first", "second"]
