"""Releases: nothing counts before its marker, and nothing is believed that has not the checksum of the index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Dict

import pytest
import torch
from torch import Tensor

from cluster.storage.releases import (
    INDEX,
    MARKER,
    Release,
    Releases,
    load_release,
    read_release,
    shards_fingerprint,
    write_shard,
)

WORLD = 2


def tensors() -> Dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ["weight/embedding", "weight/head", "weight/fast.up", "offset/fast.up", "weight/slow.up"]
    return {name: torch.randn(4, 6, generator=generator) for name in names}


def release(number: int, directory: Path) -> Release:
    """Write the shards of a candidate; returns its index."""
    names = sorted(tensors())
    shards = [
        write_shard(directory, rank, WORLD, {n: tensors()[n] for n in names[rank::WORLD]}) for rank in range(WORLD)
    ]
    return Release(number, None, 1, 5, 9, 320, shards_fingerprint(shards), shards, {"steps": 3, "figures": {"a": 1.5}})


def published(path: Path, number: int = 0) -> Path:
    releases = Releases(path)
    releases.publish(release(number, releases.prepare(number)))
    return releases.directory(number)


def test_a_release_comes_back_as_it_was_written(tmp_path: Path) -> None:
    directory = published(tmp_path)
    assert sorted(p.name for p in directory.iterdir()) == [
        MARKER,
        INDEX,
        "shard-00000-of-00002.safetensors",
        "shard-00001-of-00002.safetensors",
    ]
    loaded = load_release(directory)
    assert loaded.keys() == tensors().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors().items())
    again = read_release(directory)
    assert (again.round, again.snapshot, again.last_key, again.tokens) == (1, 5, 9, 320)
    assert again.record == {"steps": 3, "figures": {"a": 1.5}}
    assert again == Releases(tmp_path).read(0)
    assert again.fingerprint == shards_fingerprint(list(reversed(again.shards)))


def test_only_shards_that_are_needed_are_read(tmp_path: Path) -> None:
    directory = published(tmp_path)
    first, second = read_release(directory).shards
    (directory / second.file).unlink()
    loaded = load_release(directory, first.tensors[:1])
    assert list(loaded) == first.tensors[:1]


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("place", [8, -1])
def test_a_flipped_byte_is_found_and_its_file_named(tmp_path: Path, rank: int, place: int) -> None:
    directory = published(tmp_path)
    shard = read_release(directory).shards[rank]
    content = bytearray((directory / shard.file).read_bytes())
    content[place] ^= 1
    (directory / shard.file).write_bytes(bytes(content))
    with pytest.raises(ValueError, match=f"{shard.file} is damaged.*{shard.sha256}"):
        load_release(directory)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    directory = published(tmp_path)
    shard = read_release(directory).shards[1]
    (directory / shard.file).unlink()
    with pytest.raises(ValueError, match=f"{shard.file} is damaged: sha256 no file"):
        load_release(directory)


def test_without_its_marker_a_release_is_none(tmp_path: Path) -> None:
    directory = published(tmp_path)
    (directory / MARKER).unlink()
    for read in (read_release, load_release):
        with pytest.raises(ValueError, match=f"{directory.name} is no published release.*{MARKER}"):
            read(directory)
    assert Releases(tmp_path).numbers() == []
    with pytest.raises(ValueError, match="is no published release"):
        read_release(tmp_path / "nowhere")


def test_the_marker_comes_last(tmp_path: Path) -> None:
    releases = Releases(tmp_path)
    candidate = release(0, releases.prepare(0))
    assert releases.numbers() == [], "shards alone are no release"
    (releases.directory(0) / INDEX).mkdir()  # the index cannot be written
    with pytest.raises(OSError):
        releases.publish(candidate)
    assert not (releases.directory(0) / MARKER).exists()
    (releases.directory(0) / INDEX).rmdir()
    releases.publish(candidate)
    assert releases.numbers() == [0]
    assert (releases.directory(0) / MARKER).read_text() == f"{candidate.fingerprint}\n"


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    directory = published(tmp_path)
    with pytest.raises(ValueError, match="lacks 'weight/absent' and 1 other"):
        load_release(directory, ["weight/head", "weight/other", "weight/absent"])


def test_prepare_removes_what_an_earlier_attempt_left(tmp_path: Path) -> None:
    releases = Releases(tmp_path)
    (releases.prepare(3) / "shard-00001-of-00009.safetensors").write_bytes(b"left over")
    directory = releases.prepare(3)
    assert directory.name == "000003" and list(directory.iterdir()) == []
    releases.publish(release(3, directory))
    with pytest.raises(AssertionError, match="published already"):
        releases.prepare(3)
    assert load_release(directory).keys() == tensors().keys()


def test_a_candidate_can_be_discarded_and_a_release_cannot(tmp_path: Path) -> None:
    releases = Releases(tmp_path)
    release(1, releases.prepare(1))
    releases.discard(1)
    assert not releases.directory(1).exists()
    published(tmp_path, 2)
    with pytest.raises(AssertionError, match="is published"):
        releases.discard(2)


def test_numbers_are_those_published_ascending(tmp_path: Path) -> None:
    releases = Releases(tmp_path / "releases")
    for number in (11, 2, 0):
        published(releases.path, number)
    releases.prepare(12)
    (releases.path / "3 copy").mkdir()
    (releases.path / "3 copy" / MARKER).touch()
    assert releases.numbers() == [0, 2, 11]


def test_the_index_is_plain_json(tmp_path: Path) -> None:
    plain = json.loads((published(tmp_path) / INDEX).read_text())
    assert [shard["file"] for shard in plain["shards"]] == [f"shard-{r:05d}-of-00002.safetensors" for r in range(WORLD)]
    assert sorted(name for shard in plain["shards"] for name in shard["tensors"]) == sorted(tensors())
