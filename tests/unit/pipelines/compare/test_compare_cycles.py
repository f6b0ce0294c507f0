"""Check 27: five sleeps on five sources that share no words, and what was known before them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Dict

import pytest

from pipelines.compare.config import METHODS
from pipelines.compare.material import load_material, stream_of_folder
from pipelines.compare.trial import Key, Workshop
from pipelines.config.load import load_config

SOURCES = ("before", "first", "second", "third", "fourth", "fifth")
BUDGET = 0.35
"""Bits per byte that the sources of the base may get worse by."""
OPPONENTS = ("naive", "lora", "replay_50", "ewc", "one_frequency")
SETTINGS = [
    *("model.dim=24", "model.blocks=2", "model.heads=2", "model.context=32"),
    *("levels.fast.width=24", "levels.medium.width=24", "levels.slow.width=48"),
    *("levels.fast.period=128", "levels.medium.period=256", "levels.slow.period=2048"),
    *("wake.batch=4", "sleep.batch=4", "base.tokens=24576", "base.batch=8", "base.lr=4e-3"),
    *("stream.max_source_bytes=3072", "stream.probe_bytes=512"),
    *("base.sources=[before]", f"stream.sources=[{','.join(SOURCES[1:])}]"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME/train.txt and NAME/valid.txt; the words of a source are made of letters that no other one has."""
    root = tmp_path_factory.mktemp("texts")
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ"
    for number, name in enumerate(SOURCES):
        draw = random.Random(number)
        words = ["".join(draw.choices(letters[number * 6 : number * 6 + 6], k=4)) for _ in range(20)]
        (root / name).mkdir()
        for part, size in (("train", 2800), ("valid", 700)):
            lines = (" ".join(draw.choices(words, k=8)) for _ in range(size // 40))
            (root / name / f"{part}.txt").write_text("\n".join(lines))
    return root


def test_check_27_five_cycles_leave_what_was_known_before(folder: Path, tmp_path: Path) -> None:
    cfg = load_config("default", [*stream_of_folder([f"stream.path={folder}"]), *SETTINGS], "micro")
    material, shop = load_material(cfg, "A"), Workshop(tmp_path, cfg)
    found: Dict[str, Dict[str, Any]] = {}
    for name in ("circadian", *OPPONENTS):
        key = Key(name, METHODS[name], 4e-3, "whole", "A", 0, 2.0, False)
        found[name] = shop.run(key, material)
        matrix = found[name]["matrix"]
        assert len(matrix) == len(SOURCES) and all(len(row) == len(SOURCES) for row in matrix)
        print(f"\n{name}: average forgetting {found[name]['forgetting']:+.3f}, before {matrix[0][0]:.3f} -> ", end="")
        print(f"{matrix[-1][0]:.3f} (no update: {matrix[0][0]:.3f}); after each cycle, by source:")
        for row in matrix:
            print("  " + " ".join(f"{value:6.3f}" for value in row))
    lost = {name: result["matrix"][-1][0] - result["matrix"][0][0] for name, result in found.items()}
    assert found["circadian"]["rounds"] >= 5
    assert lost["naive"] > 2 * BUDGET, "these sources do not interfere: the budget would hold for anything"
    assert lost["circadian"] <= BUDGET, lost
    assert found["circadian"]["learning"] < found["circadian"]["matrix"][0][-1] - 1, "nothing was learned"
