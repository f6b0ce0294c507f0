"""The base: its mixture, its batches, and the name it is cached under."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import pytest
import torch

from nl_model.model import NestedLM
from pipelines.config.schema import BaseConfig, ComputeConfig, Config, PoolConfig, TokenizerConfig
from pipelines.data.module import open_data
from pipelines.data.stream import Sequence
from pipelines.experience import ExperienceStore, Snapshot
from pipelines.sleep.base import BaseBatches, Pretraining, base_hash, base_records, base_sequences, base_steps
from pipelines.sleep.training import Place

BOTH = ["a", "c"]


@pytest.fixture
def sequences(make_config: Callable[..., Config]) -> List[Sequence]:
    return mixture(make_config())


def mixture(config: Config, sources: List[str] = BOTH) -> List[Sequence]:
    setting = open_data(config)
    return base_sequences(setting.corpus, setting.tokenizer, config, sources)


def test_the_mixture_holds_every_sequence_of_its_sources_once(
    make_config: Callable[..., Config], sequences: List[Sequence]
) -> None:
    alone = {name: mixture(make_config(), [name]) for name in BOTH}
    for name, expected in alone.items():
        found = [s.tokens.tobytes() for s in sequences if s.source == name]
        assert found == [s.tokens.tobytes() for s in expected]
    assert len(sequences) == sum(len(part) for part in alone.values())
    order = [s.source for s in sequences]
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes > len(order) / 4, "sources are mixed, not one after the other"
    again = mixture(make_config())
    assert [s.tokens.tobytes() for s in again] == [s.tokens.tobytes() for s in sequences]


def test_too_little_text_is_refused(make_config: Callable[..., Config]) -> None:
    config = make_config()
    config = replace(config, stream=replace(config.stream, max_source_bytes=8))
    with pytest.raises(ValueError, match=r"base\.sources=\['a', 'c'\] hold less than one sequence of 16 tokens"):
        mixture(config)


def test_the_mixture_becomes_history_that_sleep_may_replay(tmp_path: Path, sequences: List[Sequence]) -> None:
    records = base_records(sequences)
    assert [record.key for record in records] == [-1 - i for i in range(len(sequences))]
    with ExperienceStore.open(tmp_path / "store", 16, "uint16") as store:
        store.append(records)
        store.commit()
        assert store.base_rows == len(sequences) and store.last_key == -1
    snapshot = Snapshot.open(tmp_path / "store")
    assert np.array_equal(snapshot.tokens(np.arange(len(records))), np.stack([s.tokens for s in sequences]))
    assert {record.kind for record in snapshot.records(np.arange(5))} == {"base"}


def test_a_base_hash_is_reproducible(make_config: Callable[..., Config], sequences: List[Sequence]) -> None:
    config = make_config()
    assert base_hash(config, BOTH, sequences) == base_hash(make_config(), list(BOTH), mixture(config))


def changed(config: Config, what: str) -> Config:
    fast, medium, slow = (config.levels[name] for name in ("fast", "medium", "slow"))
    levels = {
        "width": {**config.levels, "slow": replace(slow, width=slow.width + 1)},
        "place": {**config.levels, "slow": replace(slow, blocks="1")},
        # The base trains the pool's levels only, and blocks chain their levels from fast to slow.
        "owner": {**config.levels, "medium": replace(medium, owner="pool")},
        "order": {**config.levels, "fast": replace(fast, period=128), "medium": replace(medium, period=64)},
    }
    if what in levels:
        return replace(config, levels=levels[what])
    new: Dict[str, Any] = {
        "model": replace(config.model, rope_base=5000.0),
        "base": replace(config.base, lr=0.5),
        "run": replace(config.run, seed=4),
        "tokenizer": TokenizerConfig(kind="bpe", vocab_size=300),
        "pool": PoolConfig(ranks=1),
        "compute": ComputeConfig(precision="bf16"),
    }
    return replace(config, **{what: new[what]})


@pytest.mark.parametrize(
    "what", ["model", "width", "place", "owner", "order", "base", "run", "tokenizer", "pool", "compute"]
)
def test_a_base_hash_changes_with_what_decides_the_base(
    make_config: Callable[..., Config], sequences: List[Sequence], what: str
) -> None:
    config = make_config()
    assert base_hash(changed(config, what), BOTH, sequences) != base_hash(config, BOTH, sequences)


def test_a_base_hash_does_not_change_with_what_comes_later(
    make_config: Callable[..., Config], sequences: List[Sequence]
) -> None:
    config = make_config()
    later = replace(config, run=replace(config.run, name="other", root="elsewhere"), gate=replace(config.gate))
    later = replace(later, sleep=replace(config.sleep, recent=0.1), wake=replace(config.wake, checkpoint_every=3))
    assert base_hash(later, BOTH, sequences) == base_hash(config, BOTH, sequences)


@pytest.mark.parametrize("place", [0, 1, 100, 133])
def test_a_base_hash_changes_with_every_sequence_of_the_text(
    make_config: Callable[..., Config], sequences: List[Sequence], place: int
) -> None:
    config = make_config()
    assert len(sequences) > 133
    tokens = sequences[place].tokens.copy()
    tokens[5] += 1
    edited = [*sequences[:place], replace(sequences[place], tokens=tokens), *sequences[place + 1 :]]
    assert base_hash(config, BOTH, edited) != base_hash(config, BOTH, sequences)
    assert base_hash(config, BOTH, sequences[:-1]) != base_hash(config, BOTH, sequences)


@pytest.mark.parametrize("size", [4, 5, 60])
def test_every_sequence_is_visited_once_per_pass(sequences: List[Sequence], size: int) -> None:
    some = sequences[:23]
    batches, names = BaseBatches(some, size, seed=1), [s.tokens.tobytes() for s in some]
    visited: List[bytes] = []
    for step in range(3 * 23 // size + 1):
        batch = batches.batch(step)
        tokens, mask = batch.tokens_BS, batch.recent_B
        assert tokens.shape == (size, 17) and tokens.dtype == torch.int64
        assert mask.shape == (size,) and bool(mask.all())
        visited += [row.numpy().astype(some[0].tokens.dtype).tobytes() for row in tokens]
    passes = [visited[i : i + 23] for i in range(0, 69, 23)]
    for one in passes:
        assert sorted(one) == sorted(names)
    assert passes[0] != names and passes[0] != passes[1], "every pass has an order of its own"


def test_base_batches_are_a_pure_function_of_the_step(sequences: List[Sequence]) -> None:
    one, two = BaseBatches(sequences, 6, seed=1), BaseBatches(sequences, 6, seed=1)
    first = [one.batch(step).tokens_BS for step in range(8)]
    assert all(torch.equal(two.batch(step).tokens_BS, first[step]) for step in reversed(range(8)))
    assert not torch.equal(BaseBatches(sequences, 6, seed=2).batch(0).tokens_BS, first[0])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_a_base_batch_without_rest(sequences: List[Sequence], world: int) -> None:
    batches = BaseBatches(sequences, 6, seed=1)
    whole = batches.batch(40).tokens_BS
    together = torch.empty_like(whole)
    for rank in range(world):
        share = batches.batch(40, Place(rank, world))
        assert len(share.tokens_BS) == len(share.recent_B) == 6 // world
        together[rank::world] = share.tokens_BS
    assert torch.equal(together, whole)


def test_base_steps(make_config: Callable[..., Config]) -> None:
    assert base_steps(make_config()) == 512 // (4 * 16)
    assert base_steps(make_config(base=BaseConfig(sources=["a"], tokens=1000, batch=6))) == 1000 // (6 * 16)


def test_a_pool_of_any_size_pretrains_the_same_base(
    make_config: Callable[..., Config], sequences: List[Sequence]
) -> None:
    cfg = make_config()
    model = NestedLM(cfg.model, cfg.levels, 257)
    sizes = [replace(cfg, pool=replace(cfg.pool, ranks=ranks)) for ranks in (1, 4)]
    alone, many = (Pretraining.of(one, sequences, model) for one in sizes)
    assert alone.batch == many.batch and alone.schedule.steps == many.schedule.steps > 0
    for step in range(alone.schedule.steps):
        together = np.concatenate([many.batches.keys(step, Place(rank, 4)) for rank in range(4)])
        assert sorted(together) == sorted(alone.batches.keys(step))
        assert alone.schedule.lr(step) == many.schedule.lr(step)
