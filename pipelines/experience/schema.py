"""One experience as a row: the Arrow schema, the `Record` that mirrors it, and the way from records to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

FORMAT = 2
"""Version of the format on disk; a store with a higher one is refused. Format 1 has no parents, hence no dreams."""
KINDS = ("real", "base", "dream", "quarantined")
"""The stream, the base mixture, a dream, or the stream but not to be trained on. Snapshots code kinds by place."""
TOKEN_DTYPES = ("uint16", "uint32")
DREAM_KEY = 1 << 62
"""Smallest key of a dream; every streamed key lies below it."""
DREAMS_PER_ROUND = 1 << 20
DREAM_SOURCE = "(dreams)"
"""Source of every dream in the store, so that counts per source count real text only."""

_SCALARS = ("key", "source", "document", "offset", "subject", "kind", "surprise", "fast_step", "release")


def dream_key(round_number: int, number: int) -> int:
    """Key of a round's dream `number`, from 0: a function of both alone, so that a repeated round doubles nothing."""
    if round_number < 0 or not 0 <= number < DREAMS_PER_ROUND:
        raise ValueError(f"dream {number} of round {round_number}: a round has dreams 0..{DREAMS_PER_ROUND - 1}")
    return DREAM_KEY + round_number * DREAMS_PER_ROUND + number


@dataclass(frozen=True, eq=False, kw_only=True)
class Record:
    """One experience. Streamed rows carry keys 0, 1, 2, ...; rows of the base mixture carry -1, -2, -3, ...,
    dreams `dream_key(round, number)`."""

    key: int
    """Position of the sequence in the stream, negative for the base mixture, at least DREAM_KEY for a dream."""
    source: str
    """Name of the source of the first token."""
    document: int = 0
    """Number of the document within the source."""
    offset: int = 0
    """Offset of the first token within the document."""
    subject: str | None = None
    """Whom the text is about or belongs to, where known."""
    kind: str = "real"
    """One of KINDS."""
    surprise: float = 0.0
    """Mean loss in nats per token before learning from it; only a quarantined row may have one that is not finite."""
    fast_step: int = 0
    """Writes the learner had made when it scored the row."""
    release: int = 0
    """Release of the slow levels that scored the row."""
    parents: tuple[int, ...] | None = None
    """Keys of the experiences that a dream was made from; None for everything else."""
    tokens: npt.NDArray[np.integer[Any]]
    """Shape (context + 1,), any integer dtype whose values fit the store's token dtype."""


def make_schema(context: int, dtype: npt.DTypeLike, version: int = FORMAT) -> pa.Schema:
    """Schema of a store of sequences of `context` + 1 tokens of `dtype` (uint16 or uint32), of a format version."""
    name = np.dtype(dtype).name
    if context <= 0:
        raise ValueError(f"context={context} must be a positive number of tokens")
    if name not in TOKEN_DTYPES:
        raise ValueError(f"token dtype {name!r} is not supported; use one of {', '.join(TOKEN_DTYPES)}")
    token = pa.field("token", pa.from_numpy_dtype(np.dtype(name)), nullable=False)
    parents = [pa.field("parents", pa.list_(pa.int64()))] if version > 1 else []
    return pa.schema(
        [
            pa.field("key", pa.int64(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("document", pa.int64(), nullable=False),
            pa.field("offset", pa.int64(), nullable=False),
            pa.field("subject", pa.string()),
            pa.field("kind", pa.string(), nullable=False),
            pa.field("surprise", pa.float32(), nullable=False),
            pa.field("fast_step", pa.int64(), nullable=False),
            pa.field("release", pa.int64(), nullable=False),
            *parents,
            pa.field("tokens", pa.list_(token, context + 1), nullable=False),
        ],
        metadata={"circadian.format": str(version), "context": str(context), "token_dtype": name},
    )


def layout(schema: pa.Schema) -> tuple[int, np.dtype[Any]]:
    """(context, token dtype) of a schema made by `make_schema`."""
    return int(schema.metadata[b"context"]), np.dtype(schema.metadata[b"token_dtype"].decode())


def records_to_batch(records: Sequence[Record], schema: pa.Schema) -> pa.RecordBatch:
    """Columns of the records, in order, under `schema`.

    Raises ValueError naming the key of the first record whose tokens, kind or surprise do not fit.
    """
    context, dtype = layout(schema)
    tokens = _stack_tokens(records, context + 1, dtype)
    columns: dict[str, Any] = {name: list(map(attrgetter(name), records)) for name in _SCALARS}
    for name in ("key", "document", "offset", "fast_step", "release"):
        columns[name] = np.array(columns[name], np.int64)
    columns["surprise"] = np.array(columns["surprise"], np.float32)
    _check(columns["key"], columns["kind"], columns["surprise"])
    columns["parents"] = _parents(records, columns["kind"], "parents" in schema.names)
    columns["tokens"] = pa.FixedSizeListArray.from_arrays(pa.array(tokens), type=schema.field("tokens").type)
    return pa.record_batch([pa.array(columns[name], schema.field(name).type) for name in schema.names], schema=schema)


def _stack_tokens(records: Sequence[Record], length: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    rows = [record.tokens for record in records]
    if {row.shape for row in rows} != {(length,)}:
        wrong = next(record for record in records if record.tokens.shape != (length,))
        raise ValueError(
            f"tokens of key {wrong.key} have shape {wrong.tokens.shape}; this store holds ({length},) (context + 1)"
        )
    tokens = np.concatenate(rows)  # several times faster than stack
    if tokens.dtype == dtype:
        return tokens
    bound = np.iinfo(dtype).max
    if not np.issubdtype(tokens.dtype, np.integer) or tokens.min() < 0 or tokens.max() > bound:
        raise ValueError(
            f"tokens of keys {records[0].key}..{records[-1].key} ({tokens.dtype}) do not fit {dtype} "
            f"(integers 0..{bound}); open the store with a wider token dtype"
        )
    return tokens.astype(dtype)


def _check(keys: npt.NDArray[np.int64], kinds: list[str], surprise: npt.NDArray[np.float32]) -> None:
    for row in np.flatnonzero(~np.isfinite(surprise)).tolist():
        if kinds[row] != "quarantined":
            raise ValueError(
                f"surprise of key {keys[row]} is {surprise[row]}; only rows of kind 'quarantined' may lack a finite one"
            )
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise ValueError(f"kind={unknown.pop()!r} is unknown; use one of {', '.join(KINDS)}")
    if "base" in kinds or "dream" in kinds or keys.min() < 0 or keys.max() >= DREAM_KEY:
        for key, kind in zip(keys.tolist(), kinds, strict=True):
            if (key < 0) != (kind == "base"):
                raise ValueError(f"key {key} has kind {kind!r}; kind 'base' and negative keys go together, always")
            if (key >= DREAM_KEY) != (kind == "dream"):
                raise ValueError(f"key {key} has kind {kind!r}; kind 'dream' and keys from 2^62 go together, always")


def _parents(records: Sequence[Record], kinds: list[str], kept: bool) -> list[list[int] | None]:
    """Parents of each record. ValueError unless dreams, and only dreams, have real ones, and the store keeps them."""
    if "dream" in kinds and not kept:
        raise ValueError("this store was made by an earlier release and has no room for dreams; use dreams.share=0")
    for record in records:
        if record.parents is None and record.kind != "dream":
            continue
        parents = record.parents or ()
        if record.kind != "dream" or not parents or max(parents) >= DREAM_KEY:
            raise ValueError(
                f"key {record.key} of kind {record.kind!r} has parents {parents}; a dream, and nothing else, has at "
                "least one, and no dream is a parent"
            )
    return [None if record.parents is None else list(record.parents) for record in records]
