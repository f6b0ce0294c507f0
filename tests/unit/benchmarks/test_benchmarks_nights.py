"""The benchmarks of nights, whole, on a toy stream: what they write down holds together."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, List

import numpy as np
import pytest
from pipelines.compare.material import load_material, stream_of_folder

from benchmarks import cycles, transfer
from pipelines.config.load import load_config
from pipelines.gate.probe import Row

SMALL = [
    *("model.dim=16", "model.blocks=2", "model.heads=2", "model.context=32"),
    *("levels.fast.width=16", "levels.medium.width=16", "levels.slow.width=32"),
    *("levels.fast.period=256", "levels.medium.period=512", "levels.slow.period=2048"),
    *("wake.batch=4", "sleep.batch=4", "base.tokens=2048", "base.batch=4"),
    *("stream.max_source_bytes=2048", "stream.probe_bytes=512"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME/train.txt and NAME/valid.txt of three sources."""
    root = tmp_path_factory.mktemp("texts")
    for number, name in enumerate(("alpha", "beta", "gamma")):
        draw = random.Random(number)
        words = ["".join(draw.choices("abcdefghijklmnop"[number * 4 : number * 4 + 6], k=4)) for _ in range(20)]
        (root / name).mkdir()
        for part, size in (("train", 1400), ("valid", 400)):
            lines = (" ".join(draw.choices(words, k=8)) for _ in range(size // 8))
            (root / name / f"{part}.txt").write_text("\n".join(lines))
    return root


def measured(module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, args: List[str]) -> Dict[str, Any]:
    """What a benchmark's command writes."""
    out = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["benchmark", *args, *SMALL, "--json", str(out)])
    module.main()
    assert out.with_suffix(".md").read_text().startswith("Made by `python -m benchmarks.")
    return json.loads(out.read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", [["--nights"], ["--cycles", "5"]])
def test_cycles_fit_the_base_alone(
    mode: List[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["--data", str(folder), "--stream", "beta,gamma", "--base", "alpha", "--seeds", "1", "--epochs", "3", *mode]
    deep: List[float] = []
    sleep_deep = cycles.HandoverTrainer._deep_sleep
    counted = lambda self, recent_NS: (deep.append(self.epochs), sleep_deep(self, recent_NS))[1]  # noqa: E731
    monkeypatch.setattr(cycles.HandoverTrainer, "_deep_sleep", counted)
    found = measured(cycles, monkeypatch, tmp_path, args)
    assert len(deep) == (2 if mode == ["--nights"] else 10), "one in every life, or one after every cycle"
    assert {life["order"] for life in found["lives"]} == {"A", "reverse"}
    for life in found["lives"]:
        assert life["looks"] == len(life["base"]) == len(life["worst"])
        assert life["looks"] >= 12 if mode == ["--nights"] else life["looks"] == 5
        assert life["base"] == life["forgotten"]["alpha"], "one source of the base: its mean is its own"
        assert len(life["forgotten"]["beta"]) != len(life["forgotten"]["gamma"])
    summary = found["summary"]
    assert summary["largest"] == max(max(life["worst"]) for life in found["lives"])
    assert summary["A"]["base"]["low"] <= summary["A"]["base"]["slope"] <= summary["A"]["base"]["high"]
    page = (tmp_path / "found.md").read_text()
    assert f" {' '.join(mode)} " in page and " --epochs 3 " in page, "the page says which"
    assert set(deep) == {3.0}


def test_cycles_take_settings_of_circadian() -> None:
    assert cycles.night_of("circadian:merge=0.2:scarce=false") == cycles.Night(merge=0.2, scarce=False)
    for name in ("naive", "circadian:lr=1e-3", "circadian_nights"):
        with pytest.raises(ValueError, match=r"--method .* must be circadian"):
            cycles.night_of(name)
    with pytest.raises(ValueError, match=r"leaves nothing handed over; set handover above 0"):
        cycles.night_of("circadian:handover=0")
    assert cycles.night_of("circadian:bank=0", deep=False).bank == 0
    with pytest.raises(ValueError, match=r"leaves no deep sleep, which ends every cycle; set bank above 0"):
        cycles.night_of("circadian:bank=0")


def test_cycles_cut_the_stream_and_nothing_else(folder: Path) -> None:
    stream = [*stream_of_folder([f"stream.path={folder}"]), "stream.sources=[beta,gamma]", "base.sources=[alpha]"]
    material = load_material(load_config("default", [*stream, *SMALL], "micro"), "A")
    parts = cycles.in_cycles(material, 3).segments
    for key in ("tokens_NS", "sources_N", "bytes_N"):
        whole, cut = (np.concatenate([getattr(s, key) for s in segments]) for segments in (material.segments, parts))
        assert np.array_equal(whole, cut)
    sizes = [len(part.tokens_NS) for part in parts]
    assert max(sizes) - min(sizes) <= 8 and all(size % 4 == 0 for size in sizes[:-1]), "whole batches, about equal"
    assert len(np.unique(parts[1].sources_N)) == 2, "boundaries of sources are none of cycles"
    with pytest.raises(ValueError, match=r"--cycles 500 is more than the .* sequences of this stream fill"):
        cycles.in_cycles(material, 500)


def test_what_was_forgotten_counts_from_the_best_since_it_was_learned() -> None:
    class Material:
        sources, base_sources, ends = ["old", "new"], ["old"], {"new": 64}

        class cfg:
            class model:
                context = 32

    rows = [
        Row(0, 0, {"old": 2.0, "new": 8.0}),
        Row(1, 32, {"old": 2.5, "new": 5.0}),
        Row(2, 64, {"old": 1.5, "new": 4.0}),
        Row(3, 96, {"old": 1.75, "new": 4.5}),
    ]
    forgotten, worst, base = cycles.read(rows, Material)  # type: ignore[arg-type]
    assert forgotten == {"old": [0.5, -0.5, 0.25], "new": [-1.0, 0.5]}
    assert worst == [0.5, -0.5, 0.5] and base == forgotten["old"]


def test_transfer_judges_both_ways_that_distil(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["--data", str(folder), "--new", "beta", "--base", "alpha", "--seeds", "2"]
    found = measured(transfer, monkeypatch, tmp_path, args)
    assert [o["way"] for o in found["outcomes"]] == [*transfer.WAYS] * 2
    ways = found["summary"]["ways"]
    kept = min(ways[name]["kept"]["median"] for name in ("distilled", "distilled alone"))
    lost = max(ways[name]["lost"]["median"] for name in ("distilled", "distilled alone"))
    assert found["summary"]["met"] == (kept >= transfer.LEAST_KEPT and lost <= transfer.MOST_LOST)
