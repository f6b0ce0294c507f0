"""The dreams of a round as a file beside its candidate: an Arrow IPC stream in the store's schema."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.experience import Record, make_schema, records_to_batch

FILE = "dreams.arrow"


def write_dreams(directory: Path, records: Sequence[Record], context: int, dtype: npt.DTypeLike) -> None:
    """Write dreams durably into a candidate's directory, all or nothing; without any there is no file."""
    if not records:
        return
    from nl_model.weights import write_durably  # noqa: PLC0415 (torch, which a reader can do without)

    schema, sink = make_schema(context, dtype), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(records_to_batch(records, schema))
    write_durably(directory / FILE, sink.getvalue().to_pybytes())


def read_dreams(directory: Path) -> list[Record]:
    """The dreams in a candidate's or release's directory, by key; none where there is no file.

    Raises ValueError naming the file where it is damaged.
    """
    path = directory / FILE
    if not path.exists():
        return []
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_stream(source).read_all()
        table.validate(full=True)
        rows = table.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it from a copy, or delete it to go without") from error
    return [
        Record(**{**row, "parents": tuple(row["parents"]), "tokens": np.asarray(row["tokens"], np.int64)})
        for row in rows
    ]
