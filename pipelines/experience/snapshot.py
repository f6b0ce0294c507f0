"""A snapshot: one committed version of the store, read by memory map. Needs no lock and no writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.experience.index import RowIndex
from pipelines.experience.manifest import Entry, Manifest
from pipelines.experience.schema import Record


class Snapshot:
    """An immutable view of version V. Rows are numbered 0 .. len-1 in the order of their commits. Not thread-safe."""

    def __init__(self, path: Path, index: RowIndex, entry: Entry) -> None:
        """Use `open`."""
        self._path, self._index, self._entry = path, index, entry

    @classmethod
    def open(cls, path: str | Path, version: int | None = None, verify: bool = True) -> Snapshot:
        """The snapshot of `version` (the newest if None).

        `verify` checks each extent's CRC before its first use. Raises ValueError if there is no such store or version,
        or if its manifest is damaged; damage to segments is raised when they are first read.
        """
        path = Path(path)
        manifest = Manifest(path)
        if not manifest.directory.is_dir():
            raise ValueError(f"{path} is not an experience store (it has no directory 'manifest')")
        state = manifest.load(version)
        return cls(path, RowIndex(path, state, verify), state.entry)

    def extend(self, version: int | None = None) -> Snapshot:
        """A snapshot of a later version (the newest if None), sharing all that is open already; O(what was added).

        Raises ValueError if `version` is not there yet, or lies before this one.
        """
        state, manifest = self._index.state, Manifest(self._path)
        if version is not None and version < self.version:
            raise ValueError(f"version={version} lies before this snapshot's version {self.version}; use Snapshot.open")
        for entry in manifest.following(state.entry.version):
            if version is not None and entry.version > version:
                break
            self._index.apply(entry)
        reached = state.entry.version
        if version is not None and version > reached:
            raise ValueError(f"{manifest.directory}: no version {version} yet; the newest is {reached}")
        newest = version in (None, reached)
        return Snapshot(self._path, self._index, state.entry if newest else manifest.read(int(version or 0)))

    def __len__(self) -> int:
        """Number of rows."""
        return self._entry.rows

    @property
    def version(self) -> int:
        """The version this is a view of."""
        return self._entry.version

    @property
    def context(self) -> int:
        """Tokens per sequence, less one."""
        return self._entry.context

    @property
    def last_key(self) -> int:
        """Largest streamed key; -1: none."""
        return self._entry.last_key

    @property
    def cursor(self) -> dict[str, Any] | None:
        """Stream cursor committed with the last rows."""
        return self._entry.cursor

    @property
    def by_source(self) -> dict[str, int]:
        """Rows per source."""
        return dict(self._entry.by_source)

    @property
    def sources(self) -> list[str]:
        """Names of the sources; `source_ids` are places in this list, the same in every snapshot of a store."""
        return self._index.sources[: len(self._entry.by_source)]

    @property
    def keys(self) -> npt.NDArray[np.int64]:
        """Key of each row, shape (len,), int64. Read from the manifest; touches no segment."""
        return self._index.keys.view(len(self))

    @property
    def source_ids(self) -> npt.NDArray[np.int32]:
        """Source of each row, shape (len,), int32. Its first use, like that of the next two, reads every segment."""
        self._index.load_columns(len(self))
        return self._index.source_ids.view(len(self))

    @property
    def surprise(self) -> npt.NDArray[np.float32]:
        """Surprise of each row, shape (len,), float32, nats per token."""
        self._index.load_columns(len(self))
        return self._index.surprise.view(len(self))

    @property
    def kinds(self) -> npt.NDArray[np.uint8]:
        """Kind of each row, shape (len,), uint8: its place in `KINDS`."""
        self._index.load_columns(len(self))
        return self._index.kinds.view(len(self))

    def rows_between(self, first_key: int, last_key: int) -> npt.NDArray[np.int64]:
        """Rows whose keys lie in [first_key, last_key], shape (n,): base mixture first, then the stream; never dreams.

        Keys outside the snapshot are left out. Time is proportional to n.
        """
        base = self._index.base.view(self._entry.base_rows)[max(0, -1 - last_key) : max(0, -first_key)]
        streamed = self._index.streamed.view(self.last_key + 1)[max(0, first_key) : max(0, last_key + 1)]
        return np.concatenate([base, streamed])

    def tokens(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Tokens of `rows`, shape (n, context + 1), in the store's dtype, copied out of the memory map.

        Raises ValueError for rows outside the snapshot and for damaged segments.
        """
        rows = self._checked(rows)
        extents, places = self._index.locate(rows)
        out = np.empty((len(rows), self.context + 1), self._index.token_dtype)
        tokens = self._index.tokens
        for target, extent, place in zip(out, extents.tolist(), places.tolist(), strict=True):
            target[:] = tokens(extent)[place]
        return out

    def records(self, rows: npt.NDArray[np.int64]) -> list[Record]:
        """Whole rows, for people and audits; slow."""
        rows = self._checked(rows)
        found = []
        for number, place in zip(*(part.tolist() for part in self._index.locate(rows)), strict=True):
            extent = self._index.state.extents[number]
            fields = self._index.reader(extent).batch(extent).slice(place, 1).drop_columns("tokens").to_pylist()[0]
            parents = fields.pop("parents", None)
            fields["parents"] = None if parents is None else tuple(parents)
            found.append(Record(**fields, tokens=self._index.tokens(number)[place].copy()))
        return found

    def _checked(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        rows = np.asarray(rows, np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise ValueError(
                f"rows {rows.min()}..{rows.max()} are not all in this snapshot, which has rows 0..{len(self) - 1}"
            )
        return rows
