"""Replay: what a bounded store holds is a function of keys, whatever came when. And the store in memory."""

from __future__ import annotations

from pathlib import Path
from typing import List

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config.sleep import SleepConfig
from pipelines.experience import ExperienceStore, Record, Snapshot, dream_key
from pipelines.experience.memory import MemoryStore
from pipelines.experience.replay import Replay, held_rows, priorities, usable

CONTEXT = 16
KEYS = st.lists(st.integers(-(1 << 40), 1 << 40), min_size=1, max_size=80, unique=True)


@given(keys=KEYS, most=st.integers(0, 90), seed=st.integers(0, 1 << 62), random=st.randoms(use_true_random=False))
def test_what_is_held_does_not_depend_on_the_order_of_arrival(
    keys: List[int], most: int, seed: int, random: object
) -> None:
    other = list(keys)
    random.shuffle(other)  # type: ignore[attr-defined]
    found = []
    for order in (keys, other):
        array = np.array(order, np.int64)
        held = held_rows(np.arange(len(order)), array, most, seed)
        assert len(held) == min(most, len(keys)) and np.all(np.diff(held) > 0)
        found.append(set(array[held].tolist()))
    assert found[0] == found[1]


@given(keys=KEYS, most=st.integers(1, 40), seed=st.integers(0, 1 << 32), cut=st.integers(1, 80))
def test_what_is_once_gone_never_comes_back(keys: List[int], most: int, seed: int, cut: int) -> None:
    array = np.array(keys, np.int64)
    before = set(array[held_rows(np.arange(min(cut, len(keys))), array, most, seed)].tolist())
    after = set(array[held_rows(np.arange(len(keys)), array, most, seed)].tolist())
    assert after & set(keys[:cut]) <= before, "so a store may throw away what it does not hold"


def test_every_experience_is_held_with_equal_chance() -> None:
    keys, counts = np.arange(-50, 150), np.zeros(200)
    for seed in range(2000):
        counts[held_rows(np.arange(200), keys, 20, seed)] += 1
    assert abs(counts - 200).max() < 5 * np.sqrt(200), "twenty of two hundred, two thousand times"
    assert len(set(priorities(keys, 3).tolist())) == 200


def records(number: int) -> List[Record]:
    random = np.random.default_rng(0)
    kinds = ["base" if key < 0 else "quarantined" if key % 13 == 5 else "real" for key in range(-8, number)]
    return [
        Record(
            key=key if key >= 0 else -9 - key,
            source=f"s{random.integers(3)}",
            kind=kind,
            surprise=float(random.random()),
            tokens=random.integers(0, 300, CONTEXT + 1).astype(np.uint16),
        )
        for key, kind in zip(range(-8, number), kinds, strict=True)
    ]


@pytest.fixture
def both(tmp_path: Path) -> tuple[Snapshot, MemoryStore]:
    """The same appends to a store on disk and to one in memory, some of them twice, dreams among them."""
    memory, rows = MemoryStore(CONTEXT, "uint16"), records(60)
    shared = {"source": "s0", "kind": "dream", "surprise": 0.5, "parents": (3,)}
    dreams = [Record(key=dream_key(1, i), tokens=rows[i].tokens, **shared) for i in (0, 1)]  # type: ignore[arg-type]
    with ExperienceStore.open(tmp_path / "store", CONTEXT, "uint16") as store:
        for part in (rows[:8], rows[:8], rows[8:20], dreams, dreams, rows[18:40], rows[40:]):
            store.append(part)
            store.commit()
            memory.append(part)
    return Snapshot.open(tmp_path / "store"), memory


def test_the_store_in_memory_holds_what_the_one_on_disk_does(both: tuple[Snapshot, MemoryStore]) -> None:
    disk, memory = both[0], both[1].at()
    rows = np.arange(len(disk))
    assert len(memory) == len(disk) and memory.context == disk.context and memory.sources == list(disk.sources)
    for column in ("keys", "kinds", "source_ids", "surprise"):
        assert np.array_equal(getattr(memory, column), getattr(disk, column)), column
    here, there = memory.tokens(rows), disk.tokens(rows)
    assert np.array_equal(here, there) and here.dtype == there.dtype
    for first, last in ((-8, 59), (-3, -1), (0, 10), (50, 90), (5, 4)):
        assert np.array_equal(memory.rows_between(first, last), disk.rows_between(first, last))
    assert [r.key for r in memory.records(rows[:5])] == [r.key for r in disk.records(rows[:5])]
    assert np.array_equal(usable(memory), usable(disk))


@pytest.mark.parametrize(
    "cfg",
    [SleepConfig(), SleepConfig(balance=1.0), SleepConfig(replay_bytes=20 * CONTEXT)],
    ids=["all", "balanced", "bounded"],
)
def test_draws_are_a_function_of_seed_and_step(both: tuple[Snapshot, MemoryStore], cfg: SleepConfig) -> None:
    found = []
    for experience in (both[0], both[1].at()):
        replay = Replay(experience, np.flatnonzero(usable(experience)), cfg, 7)
        for step in reversed(range(5)):
            replay.draw(3, 1, step)
        found.append([replay.draw(6, 1, step).tolist() for step in range(5)])
        assert replay.draw(6, 2, 0).tolist() != found[-1][0]
        assert len(replay.held) == (cfg.replay_bytes // CONTEXT or int(usable(experience).sum()))
    assert found[0] == found[1] and found[0][0] != found[0][1]


def test_a_version_is_a_prefix_and_gaps_are_named() -> None:
    memory, rows = MemoryStore(CONTEXT, "uint16"), records(20)
    first = memory.append(rows[:12])
    before = memory.at(first).keys.tolist()
    assert memory.append(rows[12:]) == memory.version == first + 1 and len(memory.at()) == 28
    assert memory.at(first).keys.tolist() == before and len(memory.at(first)) == 12
    with pytest.raises(ValueError, match="key 30 leaves a gap: 29 is not there"):
        memory.append([Record(key=30, source="s", surprise=1.0, tokens=rows[0].tokens)])


def test_nothing_is_drawn_where_nothing_is_held() -> None:
    memory = MemoryStore(CONTEXT, "uint16")
    replay = Replay(memory.at(), np.empty(0, np.int64), SleepConfig(), 0)
    assert len(replay.draw(4, 0, 0)) == 0
