"""Named sources of documents: what was read from where, what is held out, and what had to be left out."""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass
from typing import Dict, FrozenSet, Iterable, Iterator, List, Mapping, Optional, Tuple

from pipelines.config.schema import StreamConfig
from pipelines.data.files import PassedOver
from pipelines.data.readers import Part, Row, too_long

_STRIDE = 1 << 40


@dataclass(frozen=True)
class Document:
    """One text of a source."""

    source: str
    text: str
    origin: str
    """The file, or file#position (byte offset in text and JSONL, row number in Parquet)."""
    subject: Optional[str] = None
    """Whom the text is about, where the data say so; what an erasure request names."""


@dataclass(frozen=True)
class Quarantined:
    """A document that was left out. `size` in bytes."""

    source: str
    origin: str
    reason: str
    size: int


@dataclass(frozen=True)
class SourceParts:
    """What a source is made of."""

    train: Tuple[Part, ...]
    probe: Tuple[Part, ...] = ()
    """Held-out files."""
    held: FrozenSet[Tuple[int, int]] = frozenset()
    """Held-out documents within `train`: (number of the part, position of the row)."""
    size: int = 0
    """Bytes of training text, approximately."""
    documents: int = 0
    """Training documents."""
    held_size: int = 0
    """Bytes of held-out text, approximately."""
    held_documents: int = 0
    more: bool = False
    """Whether there is training text beyond what was counted."""


def unknown_name(key: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a source that does not exist, with the nearest name that does."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{key} names {name!r}, which is not among the sources found: {', '.join(names)}{hint}")


def keyed_order(name: str) -> int:
    """A fixed pseudo-random number in [0, 2^64) for a name; sorting by it mixes files the same way everywhere."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


class Corpus:
    """Named sources of documents. Reads files when asked, a document at a time; nothing is kept but positions."""

    def __init__(
        self,
        parts: Mapping[str, SourceParts],
        max_document_bytes: int,
        quarantined: Iterable[Quarantined] = (),
        passed_over: Iterable[PassedOver] = (),
    ) -> None:
        self._parts = dict(parts)
        self._limit = max_document_bytes
        self._quarantined: Dict[str, Quarantined] = {item.origin: item for item in quarantined}
        self.sources: Tuple[str, ...] = tuple(sorted(self._parts))
        self.passed_over = tuple(passed_over)
        """Files below the path that are not read, by kind."""

    @property
    def quarantined(self) -> List[Quarantined]:
        """What was left out so far, each once (long Parquet rows are found while reading)."""
        return list(self._quarantined.values())

    def size(self, source: str) -> int:
        """Bytes of training text of a source, approximately."""
        return self._of(source).size

    def parts(self, source: str) -> SourceParts:
        """What a source is made of, and how much that is; ValueError for one that does not exist."""
        return self._of(source)

    def documents(self, source: str, start: int = 0) -> Iterator[Tuple[int, Document]]:
        """Training documents from index `start` (0 or an index met before) to the end, with their indices.

        Indices ascend but have gaps; they name a file and a place in it, so that seeking costs nothing. Raises
        ValueError naming file and place where a file turns out to be damaged.
        """
        parts = self._of(source)
        number, position = divmod(start, _STRIDE)
        while number < len(parts.train):
            part = parts.train[number]
            for row in part.rows(position):
                if (number, row.position) not in parts.held:
                    document = self._accept(source, part, row)
                    if document is not None:
                        yield number * _STRIDE + row.position, document
            number, position = number + 1, 0

    def probe_documents(self, source: str) -> Iterator[Document]:
        """Held-out documents of a source; none of them is ever among `documents`."""
        parts = self._of(source)
        for part in parts.probe:
            for row in part.rows():
                document = self._accept(source, part, row)
                if document is not None:
                    yield document
        for number, position in sorted(parts.held):
            part = parts.train[number]
            held = next(part.rows(position), None)
            # A row whose text turns out to be null or blank is passed over by its reader.
            document = self._accept(source, part, held) if held and held.position == position else None
            if document is not None:
                yield document

    def _of(self, source: str) -> SourceParts:
        if source not in self._parts:
            raise unknown_name("source", source, self.sources)
        return self._parts[source]

    def _accept(self, source: str, part: Part, row: Row) -> Optional[Document]:
        origin = f"{part.origin}#{row.position}"
        problem = too_long(row.size, self._limit) if row.size > self._limit else row.problem
        if problem is not None:
            self._quarantined.setdefault(origin, Quarantined(source, origin, problem, row.size))
            return None
        if not row.text or row.text.isspace():
            return None
        return Document(source, row.text, origin, row.subject)


def check_sources(corpus: Corpus, cfg: StreamConfig) -> None:
    """Raise ValueError for names in `cfg.sources` that the corpus lacks, or a source that has nothing to train on."""
    for name in cfg.sources:
        if name not in corpus.sources:
            raise unknown_name("stream.sources", name, corpus.sources)
    for source in corpus.sources:
        if next(corpus.documents(source), None) is None:
            raise ValueError(
                f"source {source!r}: no usable document is left for training after holding out its probe; "
                "add text, lower stream.probe_bytes or raise stream.max_document_bytes"
            )
