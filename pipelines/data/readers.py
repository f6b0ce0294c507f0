"""Plain-text and JSONL files into rows of text, one at a time: seekable, bounded in memory. See also parquet.py."""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterator, Optional, Protocol, Tuple, Union

BLOCK_BYTES = 8192
SUBJECT_FIELD = "subject"
_CHUNK = 1 << 20
_PARSED_AT_OPEN = 100
_MOST_DIGITS = 4000
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")


@dataclass(frozen=True)
class Row:
    """One document as a file holds it."""

    position: int
    """Where to seek to find it again: byte offset (text, JSONL) or row number (Parquet)."""
    text: str
    """Empty where `problem` says why it was not loaded."""
    size: int
    """UTF-8 bytes of the text (of the whole line where it was not loaded)."""
    subject: Optional[str] = None
    problem: Optional[str] = None


class Part(Protocol):
    """The documents that one file has for one source."""

    @property
    def origin(self) -> str:
        """The file, for people."""
        ...

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Rows from position `start` (one that an earlier row had, or 0) to the end."""
        ...


@dataclass(frozen=True)
class Fields:
    """Which column or key is what; `default` is the source of rows that name none."""

    text: str
    source: str
    default: str


def too_long(size: int, limit: int) -> str:
    """Why a document of `size` bytes is quarantined."""
    return f"{size} bytes are more than stream.max_document_bytes={limit}"


def read_error(path: Path, error: OSError) -> ValueError:
    """A file that cannot be opened, as an error of the user's."""
    return ValueError(f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions")


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise read_error(path, error) from None


def _not_utf8(path: Path, offset: int) -> ValueError:
    return ValueError(f"{path}: the bytes at offset {offset} are not UTF-8; re-encode as UTF-8")


def _decode(path: Path, offset: int, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, offset + error.start) from None


# ---- plain text -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextPart:
    """A plain-text file, cut into documents of about `block` bytes at blank lines, else at line ends.

    Where a cut falls depends only on the bytes after the one before, so reading can start at any document's offset.
    """

    path: Path
    block: int
    limit: int
    """Longest document in bytes; longer lines come as rows with a problem, read in chunks."""

    @property
    def origin(self) -> str:
        """The file's path."""
        return str(self.path)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Documents from byte offset `start`; ValueError with the offset of bytes that are not UTF-8."""
        block = max(1, min(self.block, self.limit // 3))
        with _open(self.path) as file:
            file.seek(start)
            offset, at, buffer, end_of_file = start, 0, b"", False
            while True:
                cut = _cut(buffer, at, block, self.limit, end_of_file)
                if cut is None:
                    chunk = file.read(_CHUNK)
                    end_of_file = not chunk
                    offset, at, buffer = offset + at, 0, buffer[at:] + chunk
                elif cut > at:
                    text = _decode(self.path, offset + at, buffer[at:cut])
                    yield Row(offset + at, text.removeprefix("\ufeff") if offset + at == 0 else text, cut - at)
                    at = cut
                elif at == len(buffer):
                    return
                else:
                    size = self._skip_line(file, offset + at, buffer[at:])
                    yield Row(offset + at, "", size, problem=too_long(size, self.limit))
                    offset, at, buffer = offset + at + size, 0, b""
                    file.seek(offset)

    def _skip_line(self, file: BinaryIO, offset: int, head: bytes) -> int:
        """Bytes up to and with the next line end; still checked to be UTF-8, but never held."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        size, piece = 0, head
        while piece:
            end = piece.find(b"\n") + 1
            piece = piece[:end] if end else piece
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(piece, final=False)
            except UnicodeDecodeError as error:
                raise _not_utf8(self.path, offset + size - pending + error.start) from None
            size += len(piece)
            piece = b"" if end else file.read(_CHUNK)
        if decoder.getstate()[0]:
            raise _not_utf8(self.path, offset + size - len(decoder.getstate()[0]))
        return size

    def survey(self) -> Iterator[Tuple[int, int, Optional[str]]]:
        """(position, size, problem) of every document that is not blank; reads and decodes the whole file."""
        for row in self.rows():
            if row.problem is not None or not row.text.isspace():
                yield row.position, row.size, row.problem


def _cut(buffer: bytes, at: int, block: int, limit: int, end_of_file: bool) -> Optional[int]:
    """Where the document at `at` ends; None: more bytes are needed; `at` itself: nothing left, or a line over limit."""
    left = len(buffer) - at
    if left < 2 * block and not end_of_file:
        return None
    if left <= block:
        return len(buffer)
    blank = _BLANK_LINE.search(buffer, at + block - 1, at + 2 * block)
    if blank:
        return blank.end()
    newline = buffer.find(b"\n", at + 2 * block - 1)
    if newline < 0 and not end_of_file and left <= limit:
        return None
    cut = newline + 1 if newline >= 0 else len(buffer)
    if cut - at <= limit and (newline >= 0 or end_of_file):
        return cut
    # A line over the limit: what stands before it is still a document of its own.
    return max(at, buffer.rfind(b"\n", at, at + 2 * block) + 1)


# ---- JSON lines -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JsonlPart:
    """The lines of a JSONL file that belong to one source."""

    path: Path
    fields: Fields
    source: str
    limit: int

    @property
    def origin(self) -> str:
        """The file's path."""
        return str(self.path)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Documents from byte offset `start`; ValueError names file and line of one that is malformed."""
        for position, line, size in _lines(self.path, start, self.limit):
            if not line:
                if self.source == self.fields.default:
                    yield Row(position, "", size, problem=too_long(size, self.limit))
                continue
            try:
                values = _parse(self.path, position, line, self.fields)
            except _TooDeepError as error:
                if self.source == self.fields.default:
                    yield Row(position, "", size, problem=str(error))
                continue
            if values is None or _source_of(values, self.fields) != self.source:
                continue
            yield _row(position, values[self.fields.text], values.get(SUBJECT_FIELD))


class _TooDeepError(Exception):
    """A line whose lists and objects are nested deeper than Python's parser goes."""


def _integer(digits: str) -> Union[int, float]:
    """A whole number, infinite where Python would refuse to read its digits: what it is for, nobody asks."""
    return int(digits) if len(digits) <= _MOST_DIGITS else float(digits)


def _row(position: int, text: str, subject: Any) -> Row:
    name = None if subject is None else str(subject)
    try:
        return Row(position, text, len(text.encode("utf-8")), name)
    except UnicodeEncodeError:
        return Row(position, "", len(text), name, "holds half a surrogate pair, which is not Unicode text")


def _lines(path: Path, start: int, limit: int) -> Iterator[Tuple[int, bytes, int]]:
    """(offset, line, size) of lines that are not blank; a line too long for any document within the limit is empty."""
    # Escapes take up to six bytes per byte of text, and a line holds other keys too.
    bound = 6 * limit + (1 << 16)
    with _open(path) as file:
        file.seek(start)
        position = start
        while line := file.readline(bound):
            size = len(line)
            if size == bound and not line.endswith(b"\n"):
                line = b""
                while more := file.readline(_CHUNK):
                    size += len(more)
                    if more.endswith(b"\n"):
                        break
            if not line or not line.isspace():
                yield position, line, size
            position += size


def _where(path: Path, position: int) -> str:
    """file:line of a byte offset; counts only when an error needs it."""
    count, left = 1, position
    with _open(path) as file:
        while left > 0 and (chunk := file.read(min(_CHUNK, left))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return f"{path}:{count}"


def _parse(path: Path, position: int, line: bytes, fields: Fields) -> Optional[Dict[str, Any]]:
    """The object on a line; None where its text is null or blank."""
    try:
        values = json.loads(line.decode("utf-8-sig" if position == 0 else "utf-8"), parse_int=_integer)
    except RecursionError:
        raise _TooDeepError("its lists and objects are nested too deeply to be read") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{_where(path, position)}: the bytes at offset {position + error.start} are not UTF-8; re-encode as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{_where(path, position)}: not JSON ({error.msg} at column {error.colno}); write one object per line"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(f"{_where(path, position)}: {type(values).__name__} instead of an object; write one per line")
    if fields.text not in values:
        keys = ", ".join(sorted(values)) or "none"
        raise ValueError(
            f"{_where(path, position)}: no key {fields.text!r} (stream.text_field); the keys here are: {keys}"
        )
    text = values[fields.text]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{_where(path, position)}: {fields.text!r} holds {type(text).__name__} instead of a string")
    return values if text and not text.isspace() else None


def _source_of(values: Dict[str, Any], fields: Fields) -> str:
    name = values.get(fields.source)
    return fields.default if name is None or name == "" else str(name)


def survey_jsonl(path: Path, fields: Fields, limit: int) -> Iterator[Tuple[str, int, int, Optional[str]]]:
    """(source, position, size, problem) per line. Parses the first 100 lines, and later ones that may name a source."""
    key = json.dumps(fields.source).encode("utf-8")
    for number, (position, line, size) in enumerate(_lines(path, 0, limit)):
        if not line:
            yield fields.default, position, size, too_long(size, limit)
        elif number >= _PARSED_AT_OPEN and key not in line:
            yield fields.default, position, size, None
        else:
            try:
                values = _parse(path, position, line, fields)
            except _TooDeepError as error:
                yield fields.default, position, size, str(error)
                continue
            if values is not None:
                row = _row(position, values[fields.text], None)
                problem = too_long(row.size, limit) if row.size > limit else row.problem
                yield _source_of(values, fields), position, row.size, problem
