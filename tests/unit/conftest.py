"""Tiny models, levels and corpora that several tests build on. Everything is seeded and runs on one thread."""

from __future__ import annotations

import random
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator

import pytest
import torch

from nl_model.config import LevelConfig, ModelConfig, OptimizerConfig
from nl_model.model import NestedLM
from pipelines.config.schema import (
    BaseConfig,
    Config,
    PoolConfig,
    RunSection,
    SleepConfig,
    StreamConfig,
    WakeConfig,
)

SHAPE = ModelConfig(dim=8, blocks=2, heads=2, context=16)
VOCABULARY = {"a": ["north", "south", "east"], "b": ["seven", "eleven", "twelve"], "c": ["oboe", "viola", "drum"]}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def group(_process_group: None) -> Iterator[None]:
    """A process group of one. What DeepSpeed replaces in torch for stage 3 is put back afterwards."""
    linear = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear


@pytest.fixture(scope="session")
def _process_group() -> Iterator[None]:
    """A process group of one over gloo; one for all tests of a process, because DeepSpeed remembers the first."""
    from cluster.pool.engine import join_group

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        join_group(0, 1, "127.0.0.1", port, "gloo", 30.0)
        yield
        torch.distributed.destroy_process_group()


def _levels(
    fast: int = 64,
    medium: int = 128,
    slow: int = 512,
    optimizer: OptimizerConfig | None = None,
) -> Dict[str, LevelConfig]:
    optimizer = optimizer or OptimizerConfig(lr=1e-2)
    return {
        "fast": LevelConfig(period=fast, width=6, optimizer=optimizer),
        "medium": LevelConfig(period=medium, width=5, optimizer=optimizer),
        "slow": LevelConfig(period=slow, width=7, blocks="all", owner="pool", optimizer=optimizer),
    }


def _model(
    levels: Dict[str, LevelConfig],
    vocab_size: int = 257,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shape: ModelConfig = SHAPE,
) -> NestedLM:
    model = NestedLM(shape, levels, vocab_size).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.empty(parameter.shape, dtype=torch.float64).normal_(0.0, 0.3, generator=generator)
            parameter.copy_(drawn)
    return model


@pytest.fixture(scope="session")
def make_levels() -> Callable[..., Dict[str, LevelConfig]]:
    """Levels fast, medium (learner, last block) and slow (pool, all blocks); arguments: periods, optimizer."""
    return _levels


@pytest.fixture(scope="session")
def make_model() -> Callable[..., NestedLM]:
    """A model none of whose weights is zero; arguments: levels, vocab_size, seed, dtype, shape."""
    return _model


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources, a.txt, b.txt and c.txt, with words of their own: about 4 kB each."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, (name, words) in enumerate(VOCABULARY.items()):
        rng = random.Random(number)
        paragraphs = [" ".join(rng.choice(words) for _ in range(40)) for _ in range(18)]
        (folder / f"{name}.txt").write_text("\n\n".join(paragraphs))
    return folder


@pytest.fixture(scope="session")
def make_config(corpus_folder: Path) -> Callable[..., Config]:
    """Configurations over `corpus_folder`: base a, stream b and c, wake steps of 2 x 16 tokens; arguments: sections."""

    def make(**sections: Any) -> Config:
        config = Config(
            run=RunSection(name="tiny", seed=3),
            model=SHAPE,
            levels=_levels(),
            stream=StreamConfig(
                path=str(corpus_folder), sources=["b", "c"], max_source_bytes=1600, probe_bytes=200, transition=256
            ),
            base=BaseConfig(sources=["a"], tokens=512, batch=4),
            wake=WakeConfig(batch=2),
            sleep=SleepConfig(batch=4),
            pool=PoolConfig(ranks=2),
        )
        return replace(config, **sections)

    return make
