"""Stored guides: what a teacher says of a round's recent experience, computed once and kept as its top k and the tail.

One Arrow IPC file per rank, beside the candidate, read by memory map by all ranks while the round lasts. It is a
function of the round's plan: a repeated attempt writes it anew.

Shapes: B sequences, S stored tokens, T = S - 1 predicted tokens, K tokens named.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, List, Sequence, Tuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from nl_model.distillation import TopK, divergence, top_k
from nl_model.model import NestedLM, autocast
from pipelines.experience.disk import room_for
from pipelines.experience.replay import Experience

Keys = npt.NDArray[np.int64]
Clock = Callable[[], float]


@torch.no_grad()
def read_by(
    teacher: NestedLM, snapshot: Experience, rows: Keys, batch: int, precision: str
) -> Iterator[Tuple[Keys, Tensor]]:
    """The teacher's logits (B, T, V) on rows of a snapshot, with their keys (B,), `batch` sequences at a time."""
    device = next(teacher.parameters()).device
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        tokens_BS = torch.from_numpy(snapshot.tokens(some).astype(np.int64)).to(device)
        with autocast(device, precision):
            yield snapshot.keys[some], teacher(tokens_BS[:, :-1])


def write_guides(
    path: Path, teacher: NestedLM, snapshot: Experience, rows: Keys, k: int, precision: str = "fp32", batch: int = 16
) -> int:
    """Write the guide of some rows: ids in 2 bytes (4 from 65,537 tokens on), log-probabilities in float16.

    The file has its name only when it is whole; one of that name is replaced. Returns the tokens read.
    Raises StoreFullError where there is no room.
    """
    k = min(k, teacher.vocab_size)
    schema = _schema(snapshot.context, k, teacher.vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with room_for(path, _bytes(schema, len(rows))), pa.ipc.new_file(str(temporary), schema) as writer:
        for keys, logits_BTV in read_by(teacher, snapshot, rows, batch, precision):
            writer.write_batch(_to_batch(keys, top_k(logits_BTV, k), schema))
    temporary.replace(path)
    return len(rows) * snapshot.context


class StoredGuides:
    """The guides that the ranks of a round wrote, by key."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Map the files. Raises ValueError for one that is missing or not what `write_guides` writes."""
        self._batches: List[pa.RecordBatch] = []
        self.bytes = 0
        """Size of all files."""
        for path in paths:
            try:
                with pa.memory_map(str(path)) as mapped:
                    reader = pa.ipc.open_file(mapped)
                    self._batches += [reader.get_batch(i) for i in range(reader.num_record_batches)]
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{path} is no file of stored guides: {error}; repeat the round") from error
            self.bytes += path.stat().st_size
        keys = [np.asarray(batch.column("key")) for batch in self._batches]
        sizes = [len(some) for some in keys]
        all_keys = np.concatenate(keys) if keys else np.empty(0, np.int64)
        order = np.argsort(all_keys, kind="stable")
        self.keys: Keys = all_keys[order]
        """Keys that have a guide, ascending, int64."""
        self._number = np.repeat(np.arange(len(sizes)), sizes)[order]
        self._place = np.concatenate([np.arange(size) for size in sizes] or [np.empty(0, np.int64)])[order]

    def covers(self, keys: Keys) -> bool:
        """Whether every one of `keys` has a guide."""
        return bool(np.isin(keys, self.keys).all())

    def lookup(self, keys: Keys, device: torch.device) -> TopK:
        """The guides of `keys`, which must all be covered: (B, T, K) and (B, T), on a device, float32."""
        assert self.covers(keys), "asked for a guide that was not stored"
        at = np.searchsorted(self.keys, keys)
        found = [self._row(int(self._number[i]), int(self._place[i])) for i in at]
        ids, log_p, log_tail = (np.stack(part) for part in zip(*found, strict=True))
        return TopK(
            torch.from_numpy(ids.astype(np.int64)).to(device),
            torch.from_numpy(log_p).to(device).float(),
            torch.from_numpy(log_tail).to(device).float(),
        )

    def _row(self, number: int, place: int) -> Tuple[npt.NDArray[np.integer], ...]:
        batch = self._batches[number]
        ids, log_p, tail = (_rows(batch, name)[place] for name in ("ids", "log_p", "log_tail"))
        return ids.reshape(len(tail), -1), log_p.reshape(len(tail), -1), tail


def _rows(batch: pa.RecordBatch, name: str) -> npt.NDArray[np.integer]:
    """A column of lists as a view, (rows, numbers per row)."""
    view: npt.NDArray[np.integer] = batch.column(name).flatten().to_numpy(zero_copy_only=True)
    return view.reshape(batch.num_rows, -1)


def _schema(context: int, k: int, vocab_size: int) -> pa.Schema:
    ids = pa.uint16() if vocab_size <= 1 << 16 else pa.uint32()
    parts = {"ids": (ids, k), "log_p": (pa.float16(), k), "log_tail": (pa.float16(), 1)}
    fields = [
        pa.field(name, pa.list_(pa.field("item", kind, nullable=False), context * width), nullable=False)
        for name, (kind, width) in parts.items()
    ]
    return pa.schema([pa.field("key", pa.int64(), nullable=False), *fields])


def _bytes(schema: pa.Schema, rows: int) -> int:
    lists = [schema.field(name).type for name in ("ids", "log_p", "log_tail")]
    return rows * (8 + sum(kind.list_size * kind.value_type.bit_width // 8 for kind in lists))


def _to_batch(keys: Keys, guide: TopK, schema: pa.Schema) -> pa.RecordBatch:
    ids = guide.ids_TK.cpu().numpy()
    columns = {
        "ids": ids.astype(schema.field("ids").type.value_type.to_pandas_dtype()),
        "log_p": guide.log_p_TK.half().cpu().numpy(),
        "log_tail": guide.log_tail_T.half().cpu().numpy(),
    }
    lists = [
        pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=schema.field(name).type)
        for name, values in columns.items()
    ]
    return pa.record_batch([pa.array(keys, pa.int64()), *lists], schema=schema)


@dataclass(frozen=True)
class GuideCosts:
    """What a token's guide costs, computed again at every visit and stored. Seconds and bytes per token."""

    recompute: float
    """Seconds of the teacher's pass and of the divergence from its logits, with gradient, at every visit."""
    write: float
    """Seconds of the teacher's pass, of naming its top k, and of writing them, once."""
    read: float
    """Seconds of reading them and of the divergence from them, with gradient, at every visit."""
    stored_bytes: float
    logits_bytes: float
    """What the teacher's logits would take in float32."""

    @property
    def visits_to_pay(self) -> float:
        """Visits from which on storing is cheaper; infinite where reading is no cheaper than computing."""
        saved = self.recompute - self.read
        return self.write / saved if saved > 0 else float("inf")


def measure_guides(
    teacher: NestedLM,
    snapshot: Experience,
    rows: Keys,
    k: int,
    folder: Path,
    repeats: int = 3,
    batch: int = 16,
    precision: str = "fp32",
    clock: Clock = time.perf_counter,
) -> GuideCosts:
    """Costs of both ways on some rows, medians over `repeats` visits; writes and removes a file in `folder`.

    Args:
        clock: seconds of the kind to be told, for instance time.process_time for those of the CPU.
    """
    path = folder / "measured.arrow"
    device = next(teacher.parameters()).device
    student_BTV = torch.zeros(batch, snapshot.context, teacher.vocab_size, device=device, requires_grad=True)

    def taught(guide: Tensor | TopK, count: int) -> None:
        torch.autograd.grad(divergence(student_BTV[:count], guide).sum(), student_BTV)

    def recompute() -> None:
        for keys, logits_BTV in read_by(teacher, snapshot, rows, batch, precision):
            with torch.enable_grad():
                taught(logits_BTV, len(keys))

    def write() -> None:
        write_guides(path, teacher, snapshot, rows, k, precision, batch)

    def read() -> None:
        stored = StoredGuides([path])
        for start in range(0, len(rows), batch):
            keys = snapshot.keys[rows[start : start + batch]]
            taught(stored.lookup(keys, device), len(keys))

    tokens = len(rows) * snapshot.context
    again, once, each = (_median(part, repeats, clock, device) / tokens for part in (recompute, write, read))
    stored_bytes = path.stat().st_size / tokens
    path.unlink()
    return GuideCosts(again, once, each, stored_bytes, 4.0 * teacher.vocab_size)


def _median(part: Callable[[], None], repeats: int, clock: Clock, device: torch.device) -> float:
    found = []
    for _ in range(repeats):
        start = clock()
        part()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(clock() - start)
    return float(np.median(found))
