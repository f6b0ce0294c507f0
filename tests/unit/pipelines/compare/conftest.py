"""A comparison in small: three sources of a few kilobytes, a base on one of them, rounds of 512 tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Callable, List

import pytest

from pipelines.config.load import load_config
from pipelines.config.schema import Config

SMALL = [
    *("model.dim=8", "model.blocks=2", "model.heads=2", "model.context=16"),
    *("levels.fast.period=64", "levels.fast.width=6", "levels.fast.blocks=last_half"),
    *("levels.medium.period=128", "levels.medium.width=6", "levels.slow.period=512", "levels.slow.width=8"),
    *("stream.sources=[b,c]", "stream.max_source_bytes=1600", "stream.probe_bytes=200"),
    *("base.sources=[a]", "base.tokens=512", "wake.recall=4096", "dreams.share=0", "gate.samples=100"),
]


@pytest.fixture
def small(corpus_folder: Path) -> List[str]:
    """Overrides of `smoke` that make it this small."""
    return [*SMALL, f"stream.path={corpus_folder}", "sleep.batch=4"]


@pytest.fixture
def load(small: List[str]) -> Callable[[Sequence[str]], Config]:
    """Loads the small configuration with overrides; a strategy's wake.batch counts, else two sequences are read."""

    def loaded(overrides: Sequence[str]) -> Config:
        read = [] if any("strategy=replay" in o or "strategy=naive" in o for o in overrides) else ["wake.batch=2"]
        return load_config("smoke", [*small, *read, *overrides])

    return loaded
