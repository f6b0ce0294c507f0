"""The writer and its snapshots: any interleaving yields exactly what was committed, and snapshots never change."""

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipelines.config.schema import StoreConfig
from pipelines.experience import (
    KINDS,
    ConflictError,
    ExperienceStore,
    Record,
    Snapshot,
    SyncError,
    list_store,
    make_schema,
    records_to_batch,
    verify,
)
from pipelines.experience.manifest import Manifest

CONTEXT = 7
SMALL = StoreConfig(segment_rows=10, checkpoint_every=4)


def record(key: int) -> Record:
    """A record whose every field follows from its key."""
    return Record(
        key=key,
        source=f"s{key % 3}",
        document=key * 2,
        offset=key + 100,
        subject=f"p{key}" if key % 2 else None,
        kind="base" if key < 0 else "real",
        surprise=abs(key) / 8,
        fast_step=abs(key) // 2,
        release=abs(key) // 4,
        tokens=(np.arange(CONTEXT + 1) + abs(key) * 3).astype(np.uint16),
    )


def records(first: int, count: int) -> list[Record]:
    return [record(key) for key in range(first, first + count)]


def base(first: int, count: int) -> list[Record]:
    return [record(-1 - place) for place in range(first, first + count)]


def fields(row: Record) -> tuple:
    values = {item.name: getattr(row, item.name) for item in dataclasses.fields(row)}
    return tuple(values[name].tolist() if name == "tokens" else values[name] for name in values)


def open_store(path: Path, cfg: StoreConfig = SMALL) -> ExperienceStore:
    return ExperienceStore.open(path, CONTEXT, "uint16", cfg, lock_timeout=0.2)


def assert_holds(snapshot: Snapshot, keys: list[int]) -> None:
    assert snapshot.keys.tolist() == keys
    rows = np.arange(len(keys))
    assert [fields(row) for row in snapshot.records(rows)] == [fields(record(key)) for key in keys]
    wanted = [record(key) for key in keys]
    assert [snapshot.sources[code] for code in snapshot.source_ids] == [row.source for row in wanted]
    assert [KINDS[code] for code in snapshot.kinds] == [row.kind for row in wanted]
    assert snapshot.surprise.tolist() == [row.surprise for row in wanted]
    assert snapshot.tokens(rows).tolist() == [row.tokens.tolist() for row in wanted]
    assert sum(snapshot.by_source.values()) == len(keys)


class StoreMachine(RuleBasedStateMachine):
    """The store against a list: `committed` keys in order of commit, and what is queued."""

    @initialize()
    def start(self) -> None:
        self.path = Path(tempfile.mkdtemp()) / "store"
        self.store = open_store(self.path)
        self.committed: list[int] = []
        self.queued_base: list[int] = []
        self.queued: list[int] = []
        self.cursor: dict | None = None
        self.queued_cursor: dict | None = None
        self.pinned: list[tuple[Snapshot, list[int]]] = []

    def next_key(self) -> int:
        return sum(key >= 0 for key in self.committed + self.queued)

    def next_base(self) -> int:
        return sum(key < 0 for key in self.committed + self.queued_base)

    @rule(count=st.integers(1, 7), again=st.integers(0, 5))
    def append(self, count: int, again: int) -> None:
        following = self.next_key()
        first = max(0, following - again)
        ignored = self.store.ignored
        self.store.append(records(first, following - first + count), {"next": following + count})
        assert self.store.ignored - ignored == following - first
        self.queued += range(following, following + count)
        self.queued_cursor = {"next": following + count}

    @rule(count=st.integers(1, 7), again=st.integers(0, 3))
    def append_base(self, count: int, again: int) -> None:
        following = self.next_base()
        first = max(0, following - again)
        self.store.append(base(first, following - first + count))
        self.queued_base += [-1 - place for place in range(following, following + count)]

    @precondition(lambda self: self.next_key() > 0)
    @rule()
    def append_old_rows_only(self) -> None:
        self.store.append(records(0, 1), {"next": 1})  # a late retry must not move the cursor back

    @rule()
    def commit(self) -> None:
        before = self.store.version
        anything = bool(self.queued or self.queued_base)
        assert self.store.commit() == before + anything
        self.committed += self.queued_base + self.queued
        self.cursor = self.queued_cursor or self.cursor
        self.queued, self.queued_base, self.queued_cursor = [], [], None

    @rule(garbage=st.binary(max_size=40))
    def reopen(self, garbage: bytes) -> None:
        self.store.close()
        segments = sorted((self.path / "segments").iterdir())
        if segments and segments[-1].stat().st_size and not list_sealed(self.path, len(segments) - 1):
            with segments[-1].open("ab") as tail:
                tail.write(garbage)
        self.store = open_store(self.path)
        self.queued, self.queued_base, self.queued_cursor = [], [], None

    @rule()
    def pin(self) -> None:
        previous = self.pinned[-1][0] if self.pinned else None
        snapshot = previous.extend() if previous and len(self.pinned) % 2 else Snapshot.open(self.path)
        self.pinned = [*self.pinned[-2:], (snapshot, list(self.committed))]

    @invariant()
    def counters_agree(self) -> None:
        assert self.store.rows == len(self.committed)
        assert self.store.last_key == max([key for key in self.committed if key >= 0], default=-1)
        assert self.store.cursor == self.cursor

    def teardown(self) -> None:
        for snapshot, keys in self.pinned:
            assert_holds(snapshot, keys)
        assert_holds(Snapshot.open(self.path), self.committed)
        self.store.close()
        report = verify(self.path)
        assert report.ok and report.rows == report.committed == len(self.committed), report
        shutil.rmtree(self.path.parent)


def list_sealed(path: Path, segment: int) -> bool:
    return any(info.sealed for info in list_store(path) if info.segment == segment)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_snapshot_is_isolated_and_extends(tmp_path: Path) -> None:
    with open_store(tmp_path / "s") as store:
        store.append(base(0, 3))
        store.append(records(0, 15), {"at": 15})
        first = store.commit()
        old = Snapshot.open(tmp_path / "s")
        store.append(records(15, 20), {"at": 35})
        second = store.commit()
        new = old.extend()
        middle = old.extend(first)
        assert (old.version, middle.version, new.version) == (first, first, second)
        assert (old.cursor, new.cursor) == ({"at": 15}, {"at": 35})
        before = list(range(-1, -4, -1)) + list(range(15))
        assert_holds(new, before + list(range(15, 35)))
        assert_holds(old, before)
        assert_holds(middle, before)
        assert_holds(Snapshot.open(tmp_path / "s", first), before)
        assert new.rows_between(-2, 1).tolist() == [0, 1, 3, 4]
        assert new.rows_between(30, 99).tolist() == [33, 34, 35, 36, 37]
        assert new.rows_between(50, 60).tolist() == []
        with pytest.raises(ValueError, match="no version 99"):
            new.extend(99)
        with pytest.raises(ValueError, match=r"rows 0\.\.18 are not all in this snapshot"):
            old.tokens(np.array([0, 18]))
        with pytest.raises(ValueError, match="read-only"):
            old.keys[0] = 5


def test_tokens_are_views_of_the_memory_map(tmp_path: Path) -> None:
    with open_store(tmp_path / "s") as store:
        store.append(records(0, 4))
        store.commit()
        before = pa.total_allocated_bytes()
        snapshot = Snapshot.open(tmp_path / "s")
        view = snapshot._index.tokens(0)
        assert pa.total_allocated_bytes() == before
        assert view.shape == (4, CONTEXT + 1) and view.dtype == np.uint16 and not view.flags.owndata


def test_opening_reads_the_newest_checkpoint_and_the_tail_only(tmp_path: Path) -> None:
    with open_store(tmp_path / "s") as store:
        for key in range(11):
            store.append(records(key, 1))
            store.commit()
    manifest = Manifest(tmp_path / "s")
    newest = max(manifest.checkpoints())
    assert len(manifest.checkpoints()) == 2 and newest > 4
    for version in range(1, newest + 1):
        manifest.entry_path(version).unlink()
    assert_holds(Snapshot.open(tmp_path / "s"), list(range(11)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: records(1, 2), "key 1 leaves a gap; the next key of this store is 0"),
        (lambda: [record(0), record(2)], "key 2 follows 0"),
        (lambda: base(1, 1), "key -2 leaves a gap"),
        (lambda: [dataclasses.replace(record(0), kind="base")], "key 0 has kind 'base'"),
        (lambda: [dataclasses.replace(record(0), kind="odd")], "kind='odd' is unknown"),
        (lambda: [dataclasses.replace(record(0), surprise=float("nan"))], "surprise of key 0 is nan"),
        (lambda: [dataclasses.replace(record(0), tokens=np.zeros(CONTEXT, np.uint16))], r"key 0 have shape \(7,\)"),
        (lambda: [dataclasses.replace(record(0), tokens=np.full(CONTEXT + 1, 70_000))], "do not fit uint16"),
        (lambda: [dataclasses.replace(record(0), tokens=np.full(CONTEXT + 1, -1))], "do not fit uint16"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_queued(tmp_path: Path, bad: Any, message: str) -> None:
    with open_store(tmp_path / "s") as store:
        with pytest.raises(ValueError, match=message):
            store.append([*bad()])
        version = store.version
        assert store.commit() == version and store.rows == 0
        store.append(records(0, 2))
        store.commit()
        assert store.last_key == 1


def test_wider_integers_are_narrowed_when_they_fit() -> None:
    wide = dataclasses.replace(record(0), tokens=record(0).tokens.astype(np.int64))
    schema = make_schema(CONTEXT, "uint16")
    assert records_to_batch([wide], schema).equals(records_to_batch([record(0)], schema))


def test_large_queue_commits_at_once(tmp_path: Path) -> None:
    with open_store(tmp_path / "s", StoreConfig(commit_bytes=1)) as store:
        store.append(records(0, 2))
        assert store.rows == 2


def test_segments_are_plain_arrow_streams(tmp_path: Path) -> None:
    with open_store(tmp_path / "s") as store:
        for first in range(0, 12, 4):
            store.append(records(first, 4))
            store.commit()
    (info,) = list_store(tmp_path / "s")
    assert info.sealed and info.rows == 12 and (info.min_key, info.max_key) == (0, 11)
    with pa.memory_map(str(tmp_path / "s/segments/00000000.arrow")) as file:
        assert pa.ipc.open_stream(file).read_all().column("key").to_pylist() == list(range(12))


def test_another_shape_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path / "s").close()
    with pytest.raises(ValueError, match=r"holds context=7 in uint16, not context=8"):
        ExperienceStore.open(tmp_path / "s", 8, "uint16", SMALL)
    with pytest.raises(ValueError, match=r"not context=7 in uint32"):
        ExperienceStore.open(tmp_path / "s", CONTEXT, "uint32", SMALL)
    with pytest.raises(ValueError, match="token dtype 'int64' is not supported"):
        ExperienceStore.open(tmp_path / "t", CONTEXT, "int64", SMALL)
    open_store(tmp_path / "s").close()


def test_second_writer_is_told_who_holds_the_store(tmp_path: Path) -> None:
    with open_store(tmp_path / "s"), pytest.raises(ValueError, match=rf"held by another writer \(pid {os.getpid()}\)"):
        open_store(tmp_path / "s")


def test_woken_writer_is_fenced_off(tmp_path: Path) -> None:
    old = open_store(tmp_path / "s")
    old.append(records(0, 2))
    old.commit()
    (tmp_path / "s/LOCK").unlink()  # as if the lock had been lost while the old writer slept
    new = open_store(tmp_path / "s")
    assert new.epoch == old.epoch + 1
    old.append(records(2, 3))
    with pytest.raises(ConflictError, match="made by another writer"):
        old.commit()
    with pytest.raises(OSError, match="an earlier commit failed"):
        old.commit()
    new.append(records(2, 1))
    new.commit()
    old.close()
    new.close()
    assert_holds(Snapshot.open(tmp_path / "s"), [0, 1, 2])
    assert verify(tmp_path / "s").ok


def test_failed_sync_is_never_retried(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s")
    store.append(records(0, 2))
    store.commit()
    read_end, write_end = os.pipe()
    os.dup2(write_end, store._segment._descriptor)  # a pipe takes the bytes and cannot be synced
    store.append(records(2, 2))
    with pytest.raises(SyncError, match="reopen the store"):
        store.commit()
    with pytest.raises(OSError, match="open the store again"):
        store.append(records(4, 1))
    store.close()
    for descriptor in (read_end, write_end):
        os.close(descriptor)
    with open_store(tmp_path / "s") as again:
        assert again.last_key == 1
        again.append(records(2, 2))
        again.commit()
    assert_holds(Snapshot.open(tmp_path / "s"), [0, 1, 2, 3])


def test_closed_store_refuses(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s")
    store.close()
    store.close()
    with pytest.raises(ValueError, match="is closed"):
        store.commit()


def test_no_store_is_said_plainly(tmp_path: Path) -> None:
    for reader in (Snapshot.open, verify, list_store):
        with pytest.raises(ValueError, match="not an experience store"):
            reader(tmp_path / "nowhere")
