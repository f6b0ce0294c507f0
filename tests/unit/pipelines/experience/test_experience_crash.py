"""Damage, kills, races and full disks: nothing acknowledged is lost, nothing damaged is believed."""

import ctypes
import multiprocessing
import os
import pickle
import random
import resource
import subprocess
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.config.schema import StoreConfig
from pipelines.experience import (
    ConflictError,
    ExperienceStore,
    Record,
    Snapshot,
    StoreFullError,
    make_schema,
    verify,
    verify_recent,
)
from pipelines.experience.manifest import Entry, Manifest
from pipelines.experience.segment import SegmentReader

CONTEXT = 31
SMALL = StoreConfig(segment_rows=12, checkpoint_every=3)


def records(first: int, count: int) -> list[Record]:
    return [
        Record(key=key, source=f"s{key % 2}", tokens=np.full(CONTEXT + 1, key % 60_000, np.uint16))
        for key in range(first, first + count)
    ]


def open_store(path: Path) -> ExperienceStore:
    return ExperienceStore.open(path, CONTEXT, "uint16", SMALL)


def fill(path: Path, groups: int = 4) -> None:
    with open_store(path) as store:
        for group in range(groups):
            store.append(records(group * 5, 5), {"at": group * 5 + 5})
            store.commit()


def read_all(path: Path) -> list[int]:
    snapshot = Snapshot.open(path)
    tokens = snapshot.tokens(np.arange(len(snapshot)))
    assert (tokens == (snapshot.keys % 60_000)[:, None]).all()
    return snapshot.keys.tolist()


def flip(path: Path, byte: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        (value,) = file.read(1)
        file.seek(byte)
        file.write(bytes([value ^ 1 << bit]))


def test_flipped_bits_of_entries_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    manifest = Manifest(tmp_path)
    path = manifest.entry_path(2)
    size = path.stat().st_size
    for byte in range(size):
        for bit in range(8) if byte > size - 24 else [byte % 8]:
            flip(path, byte, bit)
            with pytest.raises(ValueError, match=path.name):
                manifest.read(2)
            flip(path, byte, bit)
    assert manifest.read(2).version == 2


def test_flipped_bits_of_segments_are_refused_and_reported(tmp_path: Path) -> None:
    fill(tmp_path)
    path = tmp_path / "segments/00000000.arrow"
    end = Manifest(tmp_path).load().extents[2].end
    rng = random.Random(0)
    for byte in [0, end - 1, *(rng.randrange(end) for _ in range(40))]:
        bit = rng.randrange(8)
        flip(path, byte, bit)
        report = verify(tmp_path)
        assert not report.ok and report.rows == 15 and report.missing_keys == 5
        assert len(report.errors) == 1 and path.name in report.errors[0] and "expected CRC" in report.errors[0]
        with pytest.raises(ValueError, match=rf"{path.name} at byte \d+: expected CRC \w+ over \d+ bytes, found"):
            read_all(tmp_path)
        flip(path, byte, bit)
    assert verify(tmp_path).ok


def test_flipped_entry_and_checkpoint_are_reported_and_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    manifest = Manifest(tmp_path)
    newest, saved = max(manifest.versions()), max(manifest.checkpoints())
    for path in (manifest.entry_path(newest), manifest.checkpoint_path(saved)):
        flip(path, 30, 2)
        report = verify(tmp_path)
        assert not report.ok and any(path.name in error for error in report.errors)
        with pytest.raises(ValueError, match=path.name):
            Snapshot.open(tmp_path)
        with pytest.raises(ValueError, match=path.name):
            open_store(tmp_path)
        flip(path, 30, 2)
    assert verify(tmp_path).ok


def test_missing_pieces_are_named(tmp_path: Path) -> None:
    fill(tmp_path, 7)
    manifest = Manifest(tmp_path)
    gone = manifest.entry_path(max(manifest.checkpoints()) + 1)
    content = gone.read_bytes()
    gone.unlink()
    assert any(gone.name in error and "missing" in error for error in verify(tmp_path).errors)
    with pytest.raises(ValueError, match=f"{gone.name} is missing"):
        Snapshot.open(tmp_path)
    gone.write_bytes(content)
    segment = tmp_path / "segments/00000000.arrow"
    segment.rename(tmp_path / "elsewhere")
    report = verify(tmp_path)
    assert report.missing_keys == 15 and any("00000000.arrow is missing" in error for error in report.errors)
    with pytest.raises(ValueError, match=r"00000000\.arrow is missing"):
        read_all(tmp_path)
    (tmp_path / "elsewhere").rename(segment)
    (tmp_path / "manifest").rename(tmp_path / "away")
    with pytest.raises(ValueError, match="has segments but no manifest"):
        open_store(tmp_path)


def test_replaced_entry_breaks_the_chain(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    manifest = Manifest(tmp_path / "a")
    entry = manifest.read(3)
    manifest.entry_path(3).unlink()
    manifest.commit(replace(entry, cursor={"at": 99}))
    assert any("one was replaced" in error for error in verify(tmp_path / "a").errors)


def test_rows_that_differ_from_the_manifest_are_reported(tmp_path: Path) -> None:
    fill(tmp_path)
    manifest = Manifest(tmp_path)
    newest = max(manifest.versions())
    entry = manifest.read(newest)
    (extent,) = entry.extents
    shifted = replace(extent, min_key=extent.min_key + 1, max_key=extent.max_key + 1)
    manifest.entry_path(newest).unlink()
    manifest.commit(replace(entry, extents=(shifted,)))
    (error,) = verify(tmp_path).errors
    assert "keys or sources differ from the manifest" in error


def test_bytes_with_a_right_checksum_and_wrong_content_never_crash_the_reader(tmp_path: Path) -> None:
    fill(tmp_path)
    extent = Manifest(tmp_path).load().extents[1]
    path = tmp_path / "segments/00000000.arrow"
    whole = path.read_bytes()
    schema = make_schema(CONTEXT, "uint16")
    rng = random.Random(2)
    refused = 0
    for _ in range(600):
        data = bytearray(whole)
        data[extent.offset + rng.randrange(extent.length)] ^= 1 << rng.randrange(8)
        (tmp_path / "fuzz/segments").mkdir(parents=True, exist_ok=True)
        (tmp_path / "fuzz/segments" / path.name).write_bytes(data)
        forged = replace(extent, crc=zlib.crc32(data[extent.offset : extent.end]))
        try:
            batch = SegmentReader(tmp_path / "fuzz", 0, schema).batch(forged)
            batch.to_pylist()
        except ValueError as error:
            refused += path.name in str(error)
    assert refused > 20


def test_recent_check_stops_at_its_budget(tmp_path: Path) -> None:
    assert verify_recent(tmp_path, 1) == 0
    fill(tmp_path)
    extents = Manifest(tmp_path).load().extents
    flip(tmp_path / "segments/00000000.arrow", 100, 0)
    assert verify_recent(tmp_path, 1) == extents[-1].length
    with pytest.raises(ValueError, match=r"00000000\.arrow at byte 0: expected CRC"):
        verify_recent(tmp_path, 1 << 30)


def test_full_store_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(StoreFullError(28, "no room for 5 bytes", "a/b")))
    assert isinstance(error, StoreFullError) and error.errno == 28 and "no room for 5 bytes: 'a/b'" in str(error)


@pytest.mark.parametrize("tail", [b"", b"\0" * 7, b"\xff" * 500])
def test_torn_tail_is_cut_and_missing_bytes_are_not(tmp_path: Path, tail: bytes) -> None:
    with open_store(tmp_path) as store:
        store.append(records(0, 5))
        store.commit()
    path = tmp_path / "segments/00000000.arrow"
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    (tmp_path / "manifest/.x.tmp").write_bytes(b"half an entry")
    report = verify(tmp_path)
    assert report.ok and report.orphans == 1 and report.orphan_bytes == len(tail) + 13
    with open_store(tmp_path) as store:
        assert path.read_bytes() == whole
        store.append(records(5, 5))
        store.commit()
    assert read_all(tmp_path) == list(range(10))
    assert verify(tmp_path).orphan_bytes == 0
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="committed bytes are gone"):
        open_store(tmp_path)
    with pytest.raises(ValueError, match="committed bytes are gone"):
        read_all(tmp_path)
    assert not verify(tmp_path).ok


def _race(store: Path, barrier: Any, wins: Any) -> None:
    for version in range(1, 31):
        barrier.wait()
        try:
            Manifest(store).commit(Entry(version, os.getpid(), 0, CONTEXT, "uint16"))
        except ConflictError:
            continue
        wins.put((version, os.getpid()))


def test_of_racing_committers_exactly_one_wins(tmp_path: Path) -> None:
    (tmp_path / "manifest").mkdir()
    fork = multiprocessing.get_context("fork")
    barrier, wins = fork.Barrier(4), fork.Queue()
    racers = [fork.Process(target=_race, args=(tmp_path, barrier, wins)) for _ in range(4)]
    for racer in racers:
        racer.start()
    winners = dict(sorted(wins.get(timeout=60) for _ in range(30)))
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    assert wins.empty() and sorted(winners) == list(range(1, 31))
    assert {version: Manifest(tmp_path).read(version).epoch for version in winners} == winners
    assert not Manifest(tmp_path).temporaries()


def _write_until_killed(path: Path, acknowledge: int) -> None:
    with open_store(path) as store:
        while True:
            os.write(acknowledge, b"%d\n" % store.last_key)
            first = store.last_key + 1
            store.append(records(first, 3), {"at": first + 3})
            store.append(records(first + 3, 2), {"at": first + 5})
            store.commit()


def test_kills_lose_nothing_acknowledged(tmp_path: Path) -> None:
    rng = random.Random(1)
    acknowledged = -1
    for _ in range(10):
        read_end, write_end = os.pipe()
        writer = multiprocessing.get_context("fork").Process(target=_write_until_killed, args=(tmp_path, write_end))
        writer.start()
        os.close(write_end)
        with os.fdopen(read_end) as lines:
            for _ in range(rng.randint(2, 8)):
                acknowledged, before = int(lines.readline()), acknowledged
                assert acknowledged >= before
            time.sleep(rng.uniform(0, 0.005))
            writer.kill()
            acknowledged = max([acknowledged, *map(int, lines)])
        writer.join()
        report = verify(tmp_path)
        assert report.ok and report.rows == report.committed, report
        snapshot = Snapshot.open(tmp_path)
        assert snapshot.last_key >= acknowledged
        assert len(snapshot) % 5 == 0, "a part of a group is visible"
        assert snapshot.cursor is None or snapshot.cursor == {"at": snapshot.last_key + 1}
        assert read_all(tmp_path) == list(range(snapshot.last_key + 1))
    assert acknowledged > 100


SKIPPED = 77


def _small_disk(place: Path) -> None:
    """Mount 2 MB of memory at `place`, seen by this process only; exits with SKIPPED if that is not permitted."""
    new_mount_namespace = 0x00020000
    private = ctypes.CDLL(None).unshare(new_mount_namespace) == 0
    for arguments in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", "size=2m", "none", str(place)]):
        if not private or subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode:
            os._exit(SKIPPED)


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _fill_until_full(path: Path, group: int) -> None:
    store = open_store(path)
    ballast = path.parent / "ballast"
    if path.parent.is_mount():
        room = os.statvfs(path)
        ballast.write_bytes(bytes(room.f_bavail * room.f_frsize - 100_000))
    else:
        _limit_files(3000)
    message = "no room for .*free space and run the same command again"
    with pytest.raises(StoreFullError, match=message):
        while True:
            key = store.last_key + 1
            store.append(records(key, group), {"at": key + group})
            store.commit()
    committed = store.last_key
    report = verify(path)
    assert report.ok and report.orphan_bytes == 0 and report.rows == committed + 1, report
    with pytest.raises(StoreFullError, match=message):
        store.commit()
    ballast.unlink(missing_ok=True)
    _limit_files(resource.RLIM_INFINITY)
    store.commit()  # the queue was kept
    assert store.last_key == committed + group and store.cursor == {"at": committed + 1 + group}
    store.close()
    with open_store(path) as again:
        again.append(records(again.last_key + 1, 5))
        again.commit()
    assert verify(path).ok and read_all(path) == list(range(committed + 1 + group + 5))


def _be_full(place: Path, mounted: bool) -> None:
    if mounted:
        _small_disk(place)
    for group in (1, 7, 60):
        _fill_until_full(place / f"store-{group}", group)


@pytest.mark.parametrize("mounted", [True, False], ids=["full disk", "file size limit"])
def test_no_room_harms_nothing_and_passes(tmp_path: Path, mounted: bool) -> None:
    child = multiprocessing.get_context("fork").Process(target=_be_full, args=(tmp_path, mounted))
    child.start()
    child.join()
    if child.exitcode == SKIPPED:
        pytest.skip("mounting a small tmpfs is not permitted here")
    assert child.exitcode == 0, "the child's traceback is on stderr"
