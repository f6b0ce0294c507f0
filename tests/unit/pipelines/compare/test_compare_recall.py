"""Recall in a comparison: read by Circadian, shown for all, where everything is stored; nothing is trained on it."""

from __future__ import annotations

import random
from typing import Any, Dict

import pytest

from nl_model.recall import LENGTHS
from pipelines.compare.config import METHODS
from pipelines.compare.material import Material, load_material, stream_of_folder
from pipelines.compare.names import method_of
from pipelines.compare.options import Options
from pipelines.compare.outcome import build_outcome, page
from pipelines.compare.runner import Chosen
from pipelines.compare.trace import RECALL_SLOTS
from pipelines.compare.trial import Key, Workshop
from pipelines.config.load import load_config
from pipelines.config.schema import Config

SMALL = [
    *("model.dim=16", "model.blocks=2", "model.heads=2", "model.context=32"),
    *("levels.fast.width=16", "levels.medium.width=16", "levels.slow.width=32"),
    *("levels.fast.period=256", "levels.medium.period=512", "levels.slow.period=2048"),
    *("wake.batch=4", "sleep.batch=4", "base.tokens=1024", "base.batch=4"),
    *("stream.max_source_bytes=2048", "stream.probe_bytes=512", "base.sources=[old]", "stream.sources=[new,newer]"),
]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Three sources with words of their own."""
    root = tmp_path_factory.mktemp("texts")
    for number, name in enumerate(("old", "new", "newer")):
        draw = random.Random(number)
        words = ["".join(draw.choices("abcdefghijkl"[number * 3 : number * 3 + 6], k=5)) for _ in range(12)]
        (root / name).mkdir()
        for part, size in (("train", 500), ("valid", 120)):
            (root / name / f"{part}.txt").write_text(" ".join(draw.choices(words, k=size)))
    return load_config("default", [*stream_of_folder([f"stream.path={root}"]), *SMALL], "micro")


@pytest.fixture(scope="module")
def material(cfg: Config) -> Material:
    return load_material(cfg, "A")


@pytest.fixture(scope="module")
def trials(cfg: Config, material: Material, tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Dict[str, Any]]:
    shop, names = Workshop(tmp_path_factory.mktemp("work"), cfg), ("circadian", "circadian:recall=false", "replay_50")
    return {
        f"{name} {regime}": shop.run(Key(name, method_of(name), 2e-3, regime, "A", 0, 2.0, False), material)
        for name in (*names, "circadian_nights", "joint")
        for regime in ("whole", "cap5")
        if (name, regime) != ("joint", "cap5")
    }


def test_it_reads_better_and_trains_nothing(trials: Dict[str, Dict[str, Any]]) -> None:
    reading, alone = trials["circadian whole"], trials["circadian:recall=false whole"]
    for key in ("matrix", "weights_bpb", "recalled_bpb", "flops"):
        assert reading[key] == alone[key], key
    assert reading["online_bpb"] == reading["recalled_bpb"] < 0.8 * reading["weights_bpb"]
    assert alone["online_bpb"] == alone["weights_bpb"]
    assert reading["curve"] != alone["curve"]


def test_its_index_counts_as_stored(trials: Dict[str, Dict[str, Any]]) -> None:
    with_index, without = (trials[f"{n} whole"]["stored_bytes"] for n in ("circadian", "circadian:recall=false"))
    assert with_index - without == 8 * len(LENGTHS) * RECALL_SLOTS


def test_opponents_read_alone_and_show_what_it_would_be_worth(trials: Dict[str, Dict[str, Any]]) -> None:
    for name in ("replay_50", "circadian_nights"):
        found = trials[f"{name} whole"]
        assert found["online_bpb"] == found["weights_bpb"] > found["recalled_bpb"]
    assert trials["joint whole"]["online_bpb"] is None
    assert not METHODS["sleep_as_replay"].night.recall and not METHODS["one_frequency"].night.recall


def test_a_bounded_store_has_none(trials: Dict[str, Dict[str, Any]]) -> None:
    for name in ("circadian", "replay_50"):
        found = trials[f"{name} cap5"]
        assert found["recalled_bpb"] is None and found["online_bpb"] == found["weights_bpb"]


def test_the_page_shows_all_three_readings(trials: Dict[str, Dict[str, Any]]) -> None:
    names = ("circadian", "replay_50", "joint")
    chosen = {name: Chosen(METHODS[name], 2e-3, []) for name in names}
    results = {("whole", name, "A", 0): trials[f"{name} whole"] for name in names}
    outcome = build_outcome(Options(names, seeds=(0,), orders=("A",)), chosen, results, "circadian compare")
    found, text = outcome["regimes"]["whole"], page(outcome)
    assert "| online | weights alone | with recall | learner |" in text
    for name in names[:2]:
        row = next(line for line in text.splitlines() if line.strip("| *").startswith(name))
        figures = " | ".join(f"{found[key][name]:.3f}" for key in ("online_bpb", "weights_bpb", "recalled_bpb"))
        assert figures in row
    old = {key: {k: v for k, v in r.items() if k not in ("weights_bpb", "recalled_bpb")} for key, r in results.items()}
    assert "with recall" not in page(build_outcome(Options(names, seeds=(0,), orders=("A",)), chosen, old, "x"))
