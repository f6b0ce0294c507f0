"""The experience store's one writer: queue, group commit, crash recovery.

    store/LOCK   segments/00000000.arrow ...   manifest/00000000000000000001.json ...

A commit writes and syncs the segment and the manifest entry, then links the entry to its version number and syncs the
directory. Before the link the commit did not happen; after it, it did. Opening cuts off what no entry names.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.config.schema import StoreConfig
from pipelines.experience.disk import ConflictError, Lock, StoreFullError, sync_directory
from pipelines.experience.manifest import Entry, Manifest, State
from pipelines.experience.schema import DREAM_KEY, Record, layout, make_schema, records_to_batch
from pipelines.experience.segment import Extent, SegmentWriter


class ExperienceStore:
    """Appends experiences and commits them in groups. Not thread-safe; one open writer per store.

    After StoreFullError the store goes on: the queue is kept and `commit` may be called again. After any other OSError
    or a ConflictError it refuses to commit until it is reopened, because what is on disk is then no longer certain.
    """

    def __init__(self, path: Path, schema: pa.Schema, cfg: StoreConfig, state: State, lock: Lock) -> None:
        """Use `open`."""
        self._path, self._schema, self._cfg = path, schema, cfg
        self._manifest = Manifest(path)
        self._state, self._lock = state, lock
        self._checkpointed = max(self._manifest.checkpoints(), default=0)
        self._segment = self._continue_segment()
        self._failure: str | None = None
        self._closed = False
        self._streamed: list[pa.RecordBatch] = []
        self._base: list[pa.RecordBatch] = []
        self._dreams: list[pa.RecordBatch] = []
        """One batch per round: keys of different rounds leave gaps, and an extent has none."""
        self._queued_bytes = 0
        self._queued_cursor: dict[str, Any] | None = None
        self._next_key = state.entry.last_key + 1
        self._next_base = -state.entry.base_rows - 1
        self._next_dream = state.entry.last_dream + 1
        self._num_dreams = state.entry.dreams
        self.ignored = 0
        """Rows dropped because their key was already there."""

    @classmethod
    def open(
        cls,
        path: str | Path,
        context: int,
        dtype: npt.DTypeLike,
        cfg: StoreConfig | None = None,
        lock_timeout: float = 10.0,
    ) -> ExperienceStore:
        """Create or continue the store at `path`, holding sequences of `context` + 1 tokens of `dtype`.

        Waits up to `lock_timeout` seconds for another writer to end. Raises ValueError if it does not, if the store
        holds another schema, or if committed data is missing or damaged; StoreFullError if there is no room.
        """
        path, schema = Path(path), make_schema(context, dtype)
        for directory in (path, path / "segments", path / "manifest"):
            directory.mkdir(parents=True, exist_ok=True)
        lock = Lock(path / "LOCK", lock_timeout)
        try:
            state = _take_over(path, schema)
            schema = make_schema(context, dtype, state.entry.format)
            return cls(path, schema, cfg or StoreConfig(), state, lock)
        except (OSError, ValueError):
            lock.close()
            raise

    @property
    def version(self) -> int:
        """Newest committed version."""
        return self._state.entry.version

    @property
    def epoch(self) -> int:
        """Fencing number of this writer."""
        return self._state.entry.epoch

    @property
    def last_key(self) -> int:
        """Largest committed streamed key; -1: none."""
        return self._state.entry.last_key

    @property
    def base_rows(self) -> int:
        """Committed rows of the base mixture."""
        return self._state.entry.base_rows

    @property
    def dreams(self) -> int:
        """Committed dreams."""
        return self._state.entry.dreams

    @property
    def rows(self) -> int:
        """Committed rows of all kinds."""
        return self._state.entry.rows

    @property
    def by_source(self) -> dict[str, int]:
        """Committed rows per source."""
        return dict(self._state.entry.by_source)

    @property
    def cursor(self) -> dict[str, Any] | None:
        """Cursor committed with the newest rows; None: none yet."""
        return self._state.entry.cursor

    def append(self, records: Sequence[Record], cursor: dict[str, Any] | None = None) -> None:
        """Queue records and the stream cursor that follows them; commits at once when the queue is large.

        Streamed keys go on from the last one, base keys likewise downwards; dreams of a round come in one call, rounds
        in order. Rows that are already there are dropped and counted in `ignored`, and a cursor that comes only with
        such rows is dropped too (it lies behind). Raises ValueError for gaps, disorder or records that do not fit;
        nothing of the call is queued then.
        """
        self._require_usable()
        streamed = self._fresh([record for record in records if 0 <= record.key < DREAM_KEY], self._next_key, 1)
        base = self._fresh([record for record in records if record.key < 0], self._next_base, -1)
        dreams = self._fresh([record for record in records if record.key >= DREAM_KEY], self._next_dream, 1, gap=True)
        moved = None if cursor is None else json.loads(json.dumps(cursor, allow_nan=False))
        batches = [records_to_batch(part, self._schema) if part else None for part in (base, streamed, dreams)]
        for queue, batch in zip(self._queues(), batches, strict=True):
            if batch is not None:
                queue.append(batch)
                self._queued_bytes += batch.nbytes
        self._next_key += len(streamed)
        self._next_base -= len(base)
        self._next_dream = dreams[-1].key + 1 if dreams else self._next_dream
        self._num_dreams += len(dreams)
        self.ignored += len(records) - len(streamed) - len(base) - len(dreams)
        if moved is not None and (streamed or base or not records):
            self._queued_cursor = moved
        if self._queued_bytes >= self._cfg.commit_bytes:
            self.commit()

    def commit(self) -> int:
        """Make everything queued one new version, durable on return; returns the newest version.

        Raises StoreFullError (nothing changed, the queue is kept), SyncError, ConflictError or another OSError.
        """
        self._require_usable()
        if not (any(self._queues()) or self._queued_cursor is not None):
            return self.version
        self._failure = "it was interrupted"
        try:
            self._write()
        except StoreFullError:
            self._segment.rollback()
            self._failure = None
            raise
        except (OSError, ConflictError) as error:
            self._failure = str(error)
            raise
        self._failure = None
        self._streamed, self._base, self._dreams = [], [], []
        self._queued_bytes, self._queued_cursor = 0, None
        self._checkpoint()
        return self.version

    def close(self) -> None:
        """Release the lock. What was queued but not committed is dropped."""
        if not self._closed:
            self._closed = True
            self._segment.close()
            self._lock.close()

    def __enter__(self) -> ExperienceStore:
        """The store itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _queues(self) -> tuple[list[pa.RecordBatch], ...]:
        return self._base, self._streamed, self._dreams

    def _require_usable(self) -> None:
        if self._closed:
            raise ValueError(f"{self._path}: this store is closed; open it again")
        if self._failure is not None:
            raise OSError(f"{self._path}: an earlier commit failed ({self._failure}); open the store again")

    def _fresh(self, records: list[Record], following: int, step: int, gap: bool = False) -> list[Record]:
        """The records from key `following` on, after checking that all of them count by `step`."""
        if not records:
            return records
        keys = [record.key for record in records]
        first = keys[0]
        if keys != list(range(first, first + step * len(keys), step)):
            place = next(place for place, key in enumerate(keys) if key != first + step * place)
            raise ValueError(f"key {keys[place]} follows {keys[place - 1]}; keys must count by {step:+d} without gaps")
        known = (following - first) * step
        if known < 0 and not gap:
            raise ValueError(f"key {first} leaves a gap; the next key of this store is {following}")
        return records[max(0, known) :]

    def _continue_segment(self) -> SegmentWriter:
        """The unsealed last segment at its committed length, or a new one."""
        extents = self._state.extents
        last = extents[-1].segment if extents else -1
        if not extents or last in self._state.sealed:
            return SegmentWriter(self._path, last + 1, self._schema)
        rows = 0
        for extent in reversed(extents):
            if extent.segment != last:
                break
            rows += extent.rows
        return SegmentWriter(self._path, last, self._schema, extents[-1].end, rows)

    def _write(self) -> None:
        following = self._manifest.entry_path(self.version + 1)
        if following.exists():  # a writer that was fenced off must not touch the segment either
            raise ConflictError(f"{following} was made by another writer; this one is out of date and must be reopened")
        if self._segment.sealed:
            full_segment, number = self._segment, self._segment.segment + 1
            self._segment = SegmentWriter(self._path, number, self._schema)
            full_segment.close()
        joined = [pa.concat_batches(queue) if len(queue) > 1 else queue[0] for queue in self._queues()[:2] if queue]
        batches = joined + self._dreams
        extents = tuple(self._segment.append(batch) for batch in batches)
        full = self._segment.rows >= self._cfg.segment_rows
        if full:
            self._segment.seal()
        entry, staged = self._manifest.stage(self._next_entry(extents, full))
        try:
            staged.sync()
            self._segment.sync()
        except (OSError, ConflictError):
            staged.discard()
            raise
        self._manifest.publish(staged)
        self._segment.commit()
        self._state.apply(entry)

    def _next_entry(self, extents: tuple[Extent, ...], sealing: bool) -> Entry:
        newest = self._state.entry
        by_source = Counter(newest.by_source)
        for extent in extents:
            by_source.update(extent.sources)
        return replace(
            newest,
            version=newest.version + 1,
            previous=newest.crc,
            extents=extents,
            sealed=(self._segment.segment,) if sealing else (),
            cursor=newest.cursor if self._queued_cursor is None else self._queued_cursor,
            last_key=self._next_key - 1,
            base_rows=-self._next_base - 1,
            dreams=self._num_dreams,
            last_dream=self._next_dream - 1,
            by_source=dict(by_source),
        )

    def _checkpoint(self) -> None:
        if self.version - self._checkpointed < self._cfg.checkpoint_every:
            return
        try:
            self._manifest.write_checkpoint(self._state)
            self._checkpointed = self.version
        except StoreFullError:
            return  # the commit itself is safe; the next one tries again
        except OSError as error:
            self._failure = str(error)
            raise


def _take_over(path: Path, schema: pa.Schema) -> State:
    """Load the newest state and commit an entry with the next epoch, which fences off every earlier writer."""
    context, dtype = layout(schema)
    manifest = Manifest(path)
    for leftover in manifest.temporaries():
        leftover.unlink()
    if manifest.versions() or manifest.checkpoints():
        state = manifest.load()
        newest = state.entry
        if (newest.context, np.dtype(newest.dtype)) != (context, dtype):
            raise ValueError(
                f"{path} holds context={newest.context} in {newest.dtype}, not context={context} in {dtype}; "
                "use the model.context and tokenizer it was made with, or another run.name"
            )
    else:
        if any((path / "segments").iterdir()):
            raise ValueError(f"{path} has segments but no manifest; restore {manifest.directory} from a copy")
        state = State()
        newest = replace(state.entry, context=context, dtype=dtype.name)
        for directory in (path.parent, path):
            sync_directory(directory)
    bump = replace(
        newest, version=newest.version + 1, epoch=newest.epoch + 1, previous=newest.crc, extents=(), sealed=()
    )
    state.apply(manifest.commit(bump))
    return state
