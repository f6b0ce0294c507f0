"""The rows of a store in memory: where each row's tokens lie, and columns to select rows by. Grows, never changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.experience.manifest import Entry, State
from pipelines.experience.schema import DREAM_KEY, KINDS, make_schema
from pipelines.experience.segment import Extent, SegmentReader


class Column:
    """A numpy array that grows at its end; views handed out before stay as they were."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        """An empty column."""
        self._values: npt.NDArray[Any] = np.empty(64, dtype)
        self.size = 0

    def extend(self, values: npt.NDArray[Any]) -> None:
        """Append `values`, shape (n,), in amortised O(n)."""
        end = self.size + len(values)
        if end > len(self._values):
            grown = np.empty(max(end, 2 * len(self._values)), self._values.dtype)
            grown[: self.size] = self._values[: self.size]
            self._values = grown
        self._values[self.size : end] = values
        self.size = end

    def view(self, count: int) -> npt.NDArray[Any]:
        """The first `count` values, read-only."""
        assert count <= self.size
        view = self._values[:count]
        view.flags.writeable = False
        return view


class RowIndex:
    """All rows up to a version. Shared by the snapshots of one store, each of which looks at a prefix.

    Keys come from the manifest alone; everything else is read from an extent when it is first asked for.
    """

    def __init__(self, store: Path, state: State, verify: bool) -> None:
        """`state` is taken over. Reads no segment yet."""
        self.state = state
        self._store, self._verify = store, verify
        self._schema = make_schema(state.entry.context, state.entry.dtype, state.entry.format)
        self.token_dtype = np.dtype(state.entry.dtype)
        self.keys = Column(np.int64)
        self.streamed = Column(np.int64)
        """Row of streamed key k at place k."""
        self.base = Column(np.int64)
        """Row of base key -1 - p at place p."""
        self.source_ids = Column(np.int32)
        self.surprise = Column(np.float32)
        self.kinds = Column(np.uint8)
        self.sources: list[str] = []
        self._source_codes: dict[str, int] = {}
        self._starts = Column(np.int64)
        self._readers: dict[int, SegmentReader] = {}
        self._tokens: list[npt.NDArray[Any] | None] = []
        for extent in state.extents:
            self._add(extent)

    def apply(self, entry: Entry) -> None:
        """Move on by one version, in time proportional to what it adds."""
        self.state.apply(entry)
        for extent in entry.extents:
            self._add(extent)

    def locate(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(number of the extent, row within it) of each row; both of the shape of `rows`."""
        starts = self._starts.view(self._starts.size)
        extents = np.searchsorted(starts, rows, side="right") - 1
        return extents, rows - starts[extents]

    def tokens(self, number: int) -> npt.NDArray[Any]:
        """Memory-mapped tokens of an extent, shape (rows, context + 1). Raises ValueError if it is damaged."""
        view = self._tokens[number]
        if view is None:
            extent = self.state.extents[number]
            view = self._tokens[number] = self.reader(extent).tokens(extent)
        return view

    def reader(self, extent: Extent) -> SegmentReader:
        """Reader of the extent's segment."""
        if extent.segment not in self._readers:
            self._readers[extent.segment] = SegmentReader(self._store, extent.segment, self._schema, self._verify)
        return self._readers[extent.segment]

    def load_columns(self, rows: int) -> None:
        """Read source, surprise and kind of the first `rows` rows, where that was not done yet."""
        while self.surprise.size < rows:
            number = int(self.locate(np.array([self.surprise.size]))[0][0])
            extent = self.state.extents[number]
            batch = self.reader(extent).batch(extent)
            self.source_ids.extend(_codes(batch.column("source"), self._source_codes))
            self.kinds.extend(_codes(batch.column("kind"), {kind: code for code, kind in enumerate(KINDS)}))
            self.surprise.extend(batch.column("surprise").to_numpy())

    def _add(self, extent: Extent) -> None:
        start = self.keys.size
        if extent.min_key < DREAM_KEY:  # nobody looks for dreams by their place
            (self.base if extent.min_key < 0 else self.streamed).extend(np.arange(start, start + extent.rows))
        self.keys.extend(extent.keys())
        self._starts.extend(np.array([start]))
        self._tokens.append(None)
        for source in extent.sources:
            if source not in self._source_codes:
                self._source_codes[source] = len(self.sources)
                self.sources.append(source)


def _codes(column: Any, codes: dict[str, int]) -> npt.NDArray[np.int64]:
    """Code of each string of an Arrow column."""
    encoded = column.dictionary_encode()
    table = np.array([codes[name] for name in encoded.dictionary.to_pylist()])
    return table[encoded.indices.to_numpy()]
