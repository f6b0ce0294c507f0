"""The manifest: a log of numbered files, one per commit, that says which bytes of which segments are the store.

Version V is `manifest/{V:020d}.json`, created by an exclusive hard link, so that exactly one writer can make it. Each
entry carries a CRC of itself and the CRC of the entry before it. Now and then a checkpoint repeats the whole list,
so that opening reads one checkpoint and the entries after it, however old the store is.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pipelines.experience.disk import ConflictError, Staged
from pipelines.experience.schema import FORMAT
from pipelines.experience.segment import Extent

_ENTRY = re.compile(r"(\d{20})\.json")
_CHECKPOINT = re.compile(r"(\d{20})\.checkpoint\.json")
_KEEP_CHECKPOINTS = 2


@dataclass(frozen=True)
class Entry:
    """One version. Counters are totals over the whole store at that version."""

    version: int
    epoch: int
    """Fencing number of the writer: each opening for writing adds one."""
    previous: int
    """CRC of the entry before."""
    context: int
    dtype: str
    """Token dtype."""
    extents: tuple[Extent, ...] = ()
    """Extents this version adds."""
    sealed: tuple[int, ...] = ()
    """Segments this version seals."""
    cursor: dict[str, Any] | None = None
    """Where the stream goes on after the last row; opaque to the store."""
    last_key: int = -1
    """Largest streamed key; -1: none yet."""
    base_rows: int = 0
    """Rows of the base mixture; their keys are -1 .. -base_rows."""
    dreams: int = 0
    """Rows that are dreams."""
    last_dream: int = -1
    """Largest key of a dream; -1: none yet."""
    by_source: dict[str, int] = field(default_factory=dict)
    """Rows per source."""
    format: int = FORMAT
    crc: int = 0
    """CRC-32 of this entry on disk."""

    @property
    def rows(self) -> int:
        """Rows of all kinds."""
        return self.last_key + 1 + self.base_rows + self.dreams


class State:
    """All entries up to one version, added up."""

    def __init__(self, entry: Entry | None = None, extents: list[Extent] | None = None, sealed: set[int] | None = None):
        """An empty state (version 0), or the one that a checkpoint holds."""
        self.entry = entry or Entry(version=0, epoch=0, previous=0, context=0, dtype="")
        self.extents = extents if extents is not None else []
        self.sealed = sealed if sealed is not None else set()

    def apply(self, entry: Entry) -> None:
        """Move on by one version. Raises ValueError if `entry` does not follow."""
        if (
            entry.version != self.entry.version + 1
            or entry.previous != self.entry.crc
            or entry.epoch < self.entry.epoch
        ):
            raise ValueError(
                f"manifest entry {entry.version} (epoch {entry.epoch}, after CRC {entry.previous:08x}) does not follow "
                f"entry {self.entry.version} (epoch {self.entry.epoch}, CRC {self.entry.crc:08x}); one was replaced"
            )
        self.extents.extend(entry.extents)
        self.sealed.update(entry.sealed)
        self.entry = entry


class Manifest:
    """The log in the directory `manifest` of a store."""

    def __init__(self, store: Path) -> None:
        """Nothing is read yet."""
        self.directory = store / "manifest"

    def entry_path(self, version: int) -> Path:
        """File of a version."""
        return self.directory / f"{version:020d}.json"

    def checkpoint_path(self, version: int) -> Path:
        """File of the checkpoint of a version."""
        return self.directory / f"{version:020d}.checkpoint.json"

    def versions(self) -> list[int]:
        """Versions that have an entry, ascending."""
        return self._numbers(_ENTRY)

    def checkpoints(self) -> list[int]:
        """Versions that have a checkpoint, ascending."""
        return self._numbers(_CHECKPOINT)

    def read(self, version: int) -> Entry:
        """One entry. Raises FileNotFoundError if there is none, ValueError naming the file if it is damaged."""
        path = self.entry_path(version)
        payload, crc = _decode(path, path.read_bytes())
        entry = _entry_from(payload, crc)
        if entry.version != version:
            raise ValueError(f"{path} holds version {entry.version}; it was renamed or copied")
        return entry

    def read_checkpoint(self, version: int) -> State:
        """One checkpoint. Raises FileNotFoundError if there is none, ValueError naming the file if it is damaged."""
        path = self.checkpoint_path(version)
        payload, _ = _decode(path, path.read_bytes())
        entry = _entry_from(payload["entry"], payload["entry_crc"])
        return State(entry, [Extent(**extent) for extent in payload["extents"]], set(payload["sealed"]))

    def following(self, version: int) -> Iterator[Entry]:
        """Entries after `version` until there is no next one."""
        while True:
            version += 1
            try:
                yield self.read(version)
            except FileNotFoundError:
                return

    def load(self, version: int | None = None) -> State:
        """State at `version` (the newest if None), from the closest checkpoint before it and the entries since.

        Raises ValueError if there is no such version, or if an entry on the way is missing or damaged.
        """
        newest = max(self.versions() + self.checkpoints(), default=0)
        target = newest if version is None else version
        if not 0 < target <= newest:
            raise ValueError(f"{self.directory}: no version {target}; there are versions 1..{newest}")
        state = State()
        for checkpoint in reversed([number for number in self.checkpoints() if number <= target]):
            with suppress(FileNotFoundError):  # pruned between listing and reading
                state = self.read_checkpoint(checkpoint)
                break
        for number in range(state.entry.version + 1, target + 1):
            try:
                state.apply(self.read(number))
            except FileNotFoundError:
                raise ValueError(f"{self.entry_path(number)} is missing; restore it from a copy") from None
        return state

    def stage(self, entry: Entry) -> tuple[Entry, Staged]:
        """Write `entry` under a temporary name (not yet durable); returns it with its CRC. Raises StoreFullError."""
        data, crc = _encode(_entry_to(entry))
        return replace(entry, crc=crc), Staged(self.entry_path(entry.version), data)

    def publish(self, staged: Staged) -> None:
        """Make a staged, synced entry the next version, durably. Raises ConflictError if another writer made it."""
        try:
            staged.publish()
        except FileExistsError:
            raise ConflictError(
                f"{staged.path} was made by another writer; this one is out of date and must be reopened"
            ) from None

    def commit(self, entry: Entry) -> Entry:
        """`stage`, sync and `publish` in one."""
        entry, staged = self.stage(entry)
        _sync(staged)
        self.publish(staged)
        return entry

    def write_checkpoint(self, state: State) -> None:
        """Write the whole state; all but the newest two checkpoints go. Raises StoreFullError, SyncError."""
        payload = {
            "entry": _entry_to(state.entry),
            "entry_crc": state.entry.crc,
            "extents": [_extent_to(extent) for extent in state.extents],
            "sealed": sorted(state.sealed),
        }
        with suppress(FileExistsError):  # written before a crash, from the same entries
            staged = Staged(self.checkpoint_path(state.entry.version), _encode(payload)[0])
            _sync(staged)
            staged.publish()
        for number in self.checkpoints()[:-_KEEP_CHECKPOINTS]:
            self.checkpoint_path(number).unlink(missing_ok=True)

    def temporaries(self) -> list[Path]:
        """Temporary files that a dead writer left behind."""
        return sorted(self.directory.glob(".*.tmp"))

    def _numbers(self, pattern: re.Pattern[str]) -> list[int]:
        matches = (pattern.fullmatch(name) for name in os.listdir(self.directory))
        return sorted(int(match[1]) for match in matches if match)


def _sync(staged: Staged) -> None:
    try:
        staged.sync()
    except OSError:
        staged.discard()
        raise


def _extent_to(extent: Extent) -> dict[str, Any]:
    return {item.name: getattr(extent, item.name) for item in fields(extent)}


def _entry_to(entry: Entry) -> dict[str, Any]:
    payload = {item.name: getattr(entry, item.name) for item in fields(entry) if item.name != "crc"}
    return {**payload, "extents": [_extent_to(extent) for extent in entry.extents]}


def _entry_from(payload: dict[str, Any], crc: int) -> Entry:
    extents = tuple(Extent(**extent) for extent in payload["extents"])
    return Entry(**{**payload, "extents": extents, "sealed": tuple(payload["sealed"]), "crc": crc})


def _tail(crc: int) -> bytes:
    return b',"crc":"%08x"}\n' % crc


def _encode(payload: dict[str, Any]) -> tuple[bytes, int]:
    """JSON whose last member is the CRC-32 of every byte before it."""
    body = json.dumps(payload, separators=(",", ":"), allow_nan=False)[:-1].encode()
    crc = zlib.crc32(body)
    return body + _tail(crc), crc


def _decode(path: Path, data: bytes) -> tuple[dict[str, Any], int]:
    size = len(_tail(0))
    body, tail = data[:-size], data[-size:]
    crc = zlib.crc32(body)
    if tail != _tail(crc):
        raise ValueError(f"{path}: expected it to end in {_tail(crc)!r}, found {tail!r}; the file is damaged")
    payload = json.loads(body + b"}")
    written = payload.get("entry", payload)["format"]
    if written > FORMAT:
        raise ValueError(f"{path}: format {written} is newer than {FORMAT}; read this store with a newer release")
    return payload, crc
