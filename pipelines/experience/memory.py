"""The experience store in memory, for runs in one process: the same rows in the same order, nothing durable.

Versions count appends. A version is a prefix of the rows, as on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.experience.index import Column
from pipelines.experience.schema import DREAM_KEY, KINDS, Record


class MemoryStore:
    """Rows that only grow. A key that is there already changes nothing; streamed keys have no gaps.

    Args:
        context: tokens per sequence, less one.
        dtype: of tokens.
    """

    def __init__(self, context: int, dtype: npt.DTypeLike) -> None:
        self.context, self.dtype = context, np.dtype(dtype)
        self.sources: list[str] = []
        self.records: list[Record] = []
        self.keys, self.source_ids = Column(np.int64), Column(np.int32)
        self.kinds, self.surprise = Column(np.uint8), Column(np.float32)
        self._rows: dict[int, int] = {}
        """Row by key."""
        self.sizes: list[int] = [0]
        """Rows of each version."""

    @property
    def version(self) -> int:
        """The newest version."""
        return len(self.sizes) - 1

    def append(self, records: Sequence[Record]) -> int:
        """Take records; returns the version that holds them. ValueError for a gap in the streamed keys."""
        fresh = [record for record in records if record.key not in self._rows]
        for record in fresh:
            if 0 < record.key < DREAM_KEY and record.key - 1 not in self._rows:
                raise ValueError(f"key {record.key} leaves a gap: {record.key - 1} is not there")
            self._rows[record.key] = len(self.records)
            self.records.append(record)
            if record.source not in self.sources:
                self.sources.append(record.source)
        self.keys.extend(np.array([r.key for r in fresh], np.int64))
        self.source_ids.extend(np.array([self.sources.index(r.source) for r in fresh], np.int32))
        self.kinds.extend(np.array([KINDS.index(r.kind) for r in fresh], np.uint8))
        self.surprise.extend(np.array([r.surprise for r in fresh], np.float32))
        self.sizes.append(len(self.records))
        return self.version

    def at(self, version: int | None = None) -> MemorySnapshot:
        """A version, the newest if None."""
        return MemorySnapshot(self, self.version if version is None else version)

    def row_of(self, key: int) -> int | None:
        """Row of a key."""
        return self._rows.get(key)


class MemorySnapshot:
    """One version of a store in memory: what `Snapshot` is of one on disk."""

    def __init__(self, store: MemoryStore, version: int) -> None:
        self._store, self.version, self._size = store, version, store.sizes[version]

    def __len__(self) -> int:
        """Number of rows."""
        return self._size

    @property
    def context(self) -> int:
        """Tokens per sequence, less one."""
        return self._store.context

    @property
    def sources(self) -> list[str]:
        """Names of the sources; `source_ids` are places in this list."""
        return list(self._store.sources)

    @property
    def keys(self) -> npt.NDArray[np.int64]:
        """Key of each row."""
        return self._store.keys.view(self._size)

    @property
    def source_ids(self) -> npt.NDArray[np.int32]:
        """Source of each row."""
        return self._store.source_ids.view(self._size)

    @property
    def kinds(self) -> npt.NDArray[np.uint8]:
        """Kind of each row: its place in `KINDS`."""
        return self._store.kinds.view(self._size)

    @property
    def surprise(self) -> npt.NDArray[np.float32]:
        """Surprise of each row, nats per token."""
        return self._store.surprise.view(self._size)

    def tokens(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Tokens of rows (n, context + 1)."""
        if not len(rows):
            return np.empty((0, self.context + 1), self._store.dtype)
        return np.stack([self._store.records[row].tokens for row in rows.tolist()]).astype(self._store.dtype)

    def records(self, rows: npt.NDArray[np.int64]) -> list[Record]:
        """Whole rows."""
        return [self._store.records[row] for row in rows.tolist()]

    def rows_between(self, first_key: int, last_key: int) -> npt.NDArray[np.int64]:
        """Rows whose keys lie in [first_key, last_key]: base mixture first, then the stream; never dreams."""
        base = [self._store.row_of(key) for key in range(min(-1, last_key), first_key - 1, -1)]
        streamed = [self._store.row_of(key) for key in range(max(0, first_key), last_key + 1)]
        found = [row for row in (*base, *streamed) if row is not None and row < self._size]
        return np.array(found, np.int64)
