"""Parquet files into rows of text, by row group: seekable, bounded in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, List, Optional, Tuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.data.readers import SUBJECT_FIELD, Fields, Row, read_error, too_long

_SURVEY_ROWS = 1 << 16


@dataclass(frozen=True)
class ParquetPart:
    """The rows of a Parquet file that belong to one source."""

    path: Path
    fields: Fields
    source: str
    limit: int

    @property
    def origin(self) -> str:
        """The file's path."""
        return str(self.path)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Documents from row number `start`; row groups before it are not read."""
        with open_parquet(self.path, self.fields) as file:
            names = file.schema_arrow.names
            wanted = [name for name in (self.fields.text, self.fields.source, SUBJECT_FIELD) if name in names]
            first = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if first + count > start:
                    position = first
                    options = {"row_groups": [group], "columns": list(dict.fromkeys(wanted))}
                    for batch in _batches(file, self.path, 256, first, **options):
                        if position + batch.num_rows > start:
                            yield from self._batch(batch, position, start)
                        position += batch.num_rows
                first += count

    def _batch(self, batch: Any, first: int, start: int) -> Iterator[Row]:
        texts = batch.column(self.fields.text).cast(pa.large_string())
        sizes = pc.binary_length(texts).fill_null(0).to_pylist()
        sources = _values(batch, self.fields.source)
        subjects = _values(batch, SUBJECT_FIELD)
        for index in range(max(0, start - first), batch.num_rows):
            name = sources[index] if sources[index] not in (None, "") else self.fields.default
            if name != self.source or not sizes[index]:
                continue
            position, size = first + index, sizes[index]
            if size > self.limit:
                yield Row(position, "", size, subjects[index], too_long(size, self.limit))
                continue
            try:
                text = texts[index].as_py()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.path}: row {position}, column {self.fields.text!r}: the bytes at offset {error.start} "
                    "are not UTF-8; write the file anew with UTF-8 text"
                ) from None
            if not text.isspace():
                yield Row(position, text, size, subjects[index])


def _batches(file: Any, path: Path, size: int, first: int, **options: Any) -> Iterator[Any]:
    """Batches of rows; ValueError naming file and row where what lies on disk is damaged.

    Args:
        first: number of the first row, for the error.
    """
    try:
        batches, row = file.iter_batches(size, **options), first
        while (batch := next(batches, None)) is not None:
            yield batch
            row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: damaged at row {row} or soon after ({reason}); restore it, or remove it") from None


def _values(batch: Any, name: str) -> List[Optional[str]]:
    if name not in batch.schema.names:
        return [None] * int(batch.num_rows)
    return [None if value is None else str(value) for value in batch.column(name).to_pylist()]


def open_parquet(path: Path, fields: Fields) -> Any:
    """The open file; ValueError where it is no Parquet or has no string column of that name (lists those it has)."""
    try:
        file = pq.ParquetFile(path)
    except OSError as error:
        raise read_error(path, error) from None
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file ({error})") from None
    schema = file.schema_arrow
    for name in (fields.text, fields.source, SUBJECT_FIELD):
        if schema.names.count(name) > 1:
            raise ValueError(f"{path}: {schema.names.count(name)} columns are called {name!r}; rename all but one")
    if fields.text not in schema.names:
        raise ValueError(
            f"{path}: no column {fields.text!r} (stream.text_field); the columns are: {', '.join(schema.names)}"
        )
    kind = schema.field(fields.text).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise ValueError(f"{path}: column {fields.text!r} (stream.text_field) holds {kind}; it must hold strings")
    return file


def survey_parquet(path: Path, fields: Fields) -> Iterator[Tuple[str, np.ndarray, np.ndarray]]:
    """(source, row numbers int64 (n,), sizes int64 (n,), all the average); reads the source column only."""
    with open_parquet(path, fields) as file:
        metadata = file.metadata
        column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == fields.text)
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        total = sum(group.column(column).total_uncompressed_size for group in groups)
        mean = max(1, total // max(1, metadata.num_rows))
        first = 0
        if fields.source not in file.schema_arrow.names:
            for group in groups:
                rows = np.arange(first, first + group.num_rows, dtype=np.int64)
                yield fields.default, rows, np.full_like(rows, mean)
                first += group.num_rows
            return
        for batch in _batches(file, path, _SURVEY_ROWS, 0, columns=[fields.source]):
            names = np.array([name or fields.default for name in _values(batch, fields.source)], dtype=object)
            for name in sorted(set(names.tolist())):
                rows = first + np.flatnonzero(names == name)
                yield name, rows, np.full_like(rows, mean)
            first += batch.num_rows
