"""The stream: documents packed into sequences, read once, in an order that a schedule decides. And its probes.

A stream is a function of (corpus, tokenizer, configuration, seed): rebuilt at any cursor it yields the identical rest.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Deque, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple
from typing import Sequence as Seq

import numpy as np

from pipelines.config.schema import BaseConfig, StreamConfig
from pipelines.data.corpus import Corpus, Document
from pipelines.data.documents import unknown_name
from pipelines.data.installed import DEFAULT_BASE, DEFAULT_ORDER
from pipelines.data.schedule import SCHEDULES
from pipelines.data.tokens import Tokenizer

SUBJECT_SEPARATOR = "\n"
_SAMPLE_CHARACTERS = 4096
_MOST_HELD_OUT = 32


@dataclass(frozen=True)
class Sequence:
    """`context` tokens to predict, and the one before them."""

    key: int
    """Position in the stream: 0, 1, 2, ..."""
    source: str
    tokens: np.ndarray
    """(context + 1,) of the tokenizer's dtype; the first is the last of the source's sequence before."""
    document: int
    """Index of the document that the first token belongs to."""
    offset: int
    """Place of the first token in that document, in tokens."""
    subject: Optional[str]
    """Subjects of the documents touched, each once, joined by newlines; None where no document names one."""
    bytes: int
    """Bytes predicted: the bytes that tokens[1:] stand for."""


@dataclass(frozen=True)
class Cursor:
    """Where a stream stands."""

    key: int = 0
    """Key of the next sequence."""
    positions: Dict[str, Tuple[int, int, int, int]] = field(default_factory=dict)
    """Per source begun: sequences taken, document and token offset where the next one starts, bytes predicted."""

    def to_json(self) -> Dict[str, Any]:
        """JSON-able form."""
        return {"key": self.key, "positions": {name: list(place) for name, place in self.positions.items()}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Cursor:
        """Inverse of `to_json`; ValueError where `values` is not such a form."""
        try:
            places = {str(name): tuple(int(n) for n in place) for name, place in values["positions"].items()}
            key = int(values["key"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a stream cursor ({error!r}): {values!r}") from None
        if any(len(place) != 4 for place in places.values()):
            raise ValueError(f"not a stream cursor (four integers per source): {values!r}")
        return cls(key, {name: (a, b, c, d) for name, (a, b, c, d) in places.items()})


@dataclass(frozen=True)
class Probe:
    """Held-out text of one source."""

    source: str
    tokens: np.ndarray
    """(n, context + 1) of the tokenizer's dtype; row i predicts tokens[i, 1:]."""
    bytes: int
    """Bytes that the predicted tokens stand for, over all rows."""
    row_bytes: Tuple[int, ...] = ()
    """The same per row; empty: spread evenly."""


@dataclass(frozen=True)
class _Window:
    """context + 1 tokens of one source, before they have a key."""

    tokens: np.ndarray
    document: int
    offset: int
    subject: Optional[str]
    bytes: int
    end: Tuple[int, int]
    """Document and token offset of the last token: where the next window starts."""


def _windows(
    documents: Iterable[Tuple[int, Document]], tokenizer: Tokenizer, context: int, offset: int = 0
) -> Iterator[_Window]:
    """Documents with eos behind each, cut into windows that overlap by one token; an incomplete last one is dropped.

    `offset` is where the first window starts in the first document, in tokens.
    """
    eos = np.array([tokenizer.eos], dtype=tokenizer.dtype)
    held: Deque[Tuple[int, np.ndarray, Optional[str]]] = deque()
    available, start = -offset, offset
    for index, document in documents:
        tokens = np.concatenate([tokenizer.encode(document.text), eos])
        held.append((index, tokens, document.subject))
        available += len(tokens)
        while available > context:
            window, start = _take(held, start, context, tokenizer)
            available -= context
            yield window


def _take(
    held: Deque[Tuple[int, np.ndarray, Optional[str]]], start: int, context: int, tokenizer: Tokenizer
) -> Tuple[_Window, int]:
    """The window that starts `start` tokens into the first held document; drops documents before its last token."""
    while start >= len(held[0][1]):
        start -= len(held.popleft()[1])
    first, offset = held[0][0], start
    pieces, subjects, missing = [], [], context + 1
    while True:
        index, tokens, subject = held[0]
        piece = tokens[start : start + missing]
        pieces.append(piece)
        if subject is not None and subject not in subjects:
            subjects.append(subject)
        missing -= len(piece)
        if not missing:
            break
        held.popleft()
        start = 0
    packed = np.concatenate(pieces)
    last = start + len(piece) - 1
    size = int(tokenizer.byte_lengths[packed[1:]].sum())
    names = SUBJECT_SEPARATOR.join(subjects) or None
    return _Window(packed, first, offset, names, size, (index, last)), last


def _starting_at(
    documents: Iterable[Tuple[int, Document]], source: str, expected: Optional[int]
) -> Iterator[Tuple[int, Document]]:
    """The documents, after a check that the first one is the expected one (None: any)."""
    found = iter(documents)
    first = next(found, None)
    if expected is not None and (first is None or first[0] != expected):
        raise ValueError(
            f"source {source!r}: document {expected}, where the stream stood, is not there any more; "
            "the data of a run must not change, so restore it or start a run with a new run.name"
        )
    if first is not None:
        yield first
        yield from found


class _SourceReader:
    """The windows of one source from a place on, up to a number of bytes; knows whether there is another."""

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer, source: str, context: int, place: Tuple[int, int, int, int]
    ) -> None:
        self.taken, document, offset, self.bytes = place
        documents = _starting_at(corpus.documents(source, document), source, document if self.taken else None)
        self._windows = _windows(documents, tokenizer, context, offset)
        self._next: Optional[_Window] = None

    def peek(self, limit: int) -> Optional[_Window]:
        """The next window; None where the source, or its share of `limit` bytes (0: no limit), is used up."""
        if self._next is None:
            self._next = next(self._windows, None)
        if self._next is None or (limit and self.bytes + self._next.bytes > limit):
            return None
        return self._next

    def take(self, window: _Window) -> Tuple[int, int, int, int]:
        """Move past the window that `peek` gave; returns the place behind it."""
        assert window is self._next, "only the window that was peeked may be taken"
        self._next = None
        self.taken += 1
        self.bytes += window.bytes
        return (self.taken, *window.end, self.bytes)


class Stream:
    """Iterator over the sequences of several sources. Nothing is read before it is needed."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        cfg: StreamConfig,
        context: int,
        sources: Seq[str],
        seed: int,
        cursor: Optional[Cursor] = None,
    ) -> None:
        """Stand at `cursor`, or at the beginning.

        Raises ValueError for sources that the corpus lacks or that are named twice, and for a cursor with others.
        """
        _check_names("sources", sources, corpus.sources)
        cursor = cursor or Cursor()
        for name in cursor.positions:
            if name not in sources:
                raise unknown_name("the cursor", name, sources)
        self._corpus, self._tokenizer, self._cfg = corpus, tokenizer, cfg
        self._context, self._sources, self._seed = context, list(sources), seed
        self._key, self._positions = cursor.key, dict(cursor.positions)
        self._drawn = cursor.key
        self._readers = {
            name: _SourceReader(corpus, tokenizer, name, context, cursor.positions.get(name, (0, 0, 0, 0)))
            for name in self._sources
        }
        self._finished = [False] * len(self._sources)
        self._totals = [self._estimate(name) / context for name in self._sources]
        self._ready: Deque[Tuple[Sequence, Tuple[int, int, int, int]]] = deque()

    def __iter__(self) -> Iterator[Sequence]:
        return self

    def __next__(self) -> Sequence:
        batch = self.next_batch(1)
        if not batch:
            raise StopIteration
        return batch[0]

    def next_batch(self, n: int) -> List[Sequence]:
        """The next n sequences, keys consecutive; [] where fewer remain (the cursor then stays where it is)."""
        if n < 1:
            raise ValueError(f"next_batch(n={n}): n must be at least 1")
        while len(self._ready) < n:
            drawn = self._draw()
            if drawn is None:
                return []
            self._ready.append(drawn)
        batch = [self._ready.popleft() for _ in range(n)]
        for sequence, place in batch:
            self._positions[sequence.source] = place
        self._key += n
        return [sequence for sequence, _ in batch]

    @property
    def cursor(self) -> Cursor:
        """The place behind the last batch returned."""
        return Cursor(self._key, dict(self._positions))

    def estimate_tokens(self) -> int:
        """About how many tokens the whole stream will predict, from file sizes and a sample of each source."""
        return round(sum(self._totals) * self._context)

    def _estimate(self, source: str) -> float:
        size = self._corpus.size(source)
        if self._cfg.limit:
            size = min(size, self._cfg.limit)
        sample = next((d.text[:_SAMPLE_CHARACTERS] for _, d in self._corpus.documents(source)), "")
        length = len(sample.encode("utf-8"))
        return size * len(self._tokenizer.encode(sample)) / length if length else 0.0

    def _draw(self) -> Optional[Tuple[Sequence, Tuple[int, int, int, int]]]:
        """The sequence with the next key, and its source's place behind it; None at the end."""
        limit = self._cfg.limit
        alive = self._alive(limit)
        if not any(alive):
            return None
        width = self._cfg.transition / self._context
        choose = SCHEDULES[self._cfg.schedule]
        name = self._sources[choose(self._drawn, self._seed, self._totals, alive, width)]
        reader = self._readers[name]
        window = reader.peek(limit)
        assert window is not None, "a schedule may only choose a source that has something left"
        sequence = Sequence(
            self._drawn, name, window.tokens, window.document, window.offset, window.subject, window.bytes
        )
        self._drawn += 1
        return sequence, reader.take(window)

    def _alive(self, limit: int) -> List[bool]:
        """Which sources have something left; what the schedules see must not depend on what was asked before."""
        ahead = self._cfg.schedule != "sequential"
        for index, name in enumerate(self._sources):
            if not self._finished[index]:
                self._finished[index] = self._readers[name].peek(limit) is None
                if not (ahead or self._finished[index]):
                    # A sequential schedule looks no further, and so opens one source at a time.
                    break
        return [not finished for finished in self._finished]


def build_probes(
    corpus: Corpus, tokenizer: Tokenizer, cfg: StreamConfig, context: int, sources: Seq[str]
) -> Dict[str, Probe]:
    """Held-out sequences of each source, about `cfg.probe_bytes` bytes, spread evenly over its held-out text.

    Raises ValueError where that text is too short for one sequence.
    """
    _check_names("sources", sources, corpus.sources)
    return {name: _probe(corpus, tokenizer, cfg, context, name) for name in sources}


def _probe(corpus: Corpus, tokenizer: Tokenizer, cfg: StreamConfig, context: int, source: str) -> Probe:
    documents = enumerate(_at_most(corpus.probe_documents(source), _MOST_HELD_OUT * cfg.probe_bytes))
    windows = list(_windows(documents, tokenizer, context))
    if not windows:
        held = sum(len(tokenizer.encode(document.text)) for document in corpus.probe_documents(source))
        raise ValueError(
            f"source {source!r}: its held-out text has {held} tokens, but one sequence needs {context + 1} "
            f"(model.context + 1); add text, lower model.context or raise stream.probe_bytes (now {cfg.probe_bytes})"
        )
    mean = sum(window.bytes for window in windows) / len(windows)
    count = min(len(windows), max(1, round(cfg.probe_bytes / mean)))
    chosen = [windows[(2 * i + 1) * len(windows) // (2 * count)] for i in range(count)]
    row_bytes = tuple(window.bytes for window in chosen)
    return Probe(source, np.stack([window.tokens for window in chosen]), sum(row_bytes), row_bytes)


def _at_most(documents: Iterable[Document], size: int) -> Iterator[Document]:
    """Documents until `size` bytes are reached, the one that reaches it included."""
    for document in documents:
        yield document
        size -= len(document.text.encode("utf-8"))
        if size <= 0:
            return


def select_sources(corpus: Corpus, stream_cfg: StreamConfig, base_cfg: BaseConfig) -> Tuple[List[str], List[str]]:
    """(sources of the base, sources of the stream), each in order.

    Named ones are taken as they are. Without names, the base gets the first two sources of the stream (one, where there
    are fewer than three, and then the stream keeps it; none, where no base is pretrained), and the stream every other
    one. The installation's own texts have a default order. Raises ValueError for unknown names and for a stream
    without a source.
    """
    _check_names("stream.sources", stream_cfg.sources, corpus.sources)
    _check_names("base.sources", base_cfg.sources, corpus.sources)
    if stream_cfg.path is None:
        known = [name for name in (*DEFAULT_BASE, *DEFAULT_ORDER) if name in corpus.sources]
        first = [name for name in DEFAULT_BASE if name in known]
    else:
        known = stream_cfg.sources or list(corpus.sources)
        first = list(islice(known, 2 if len(known) > 2 else 1))
    pretrains = base_cfg.checkpoint is None and base_cfg.tokens > 0
    base = base_cfg.sources or (first if pretrains else [])
    few = stream_cfg.path is not None and len(known) < 3 and not base_cfg.sources
    stream = stream_cfg.sources or [name for name in known if few or name not in base]
    if not stream:
        raise ValueError(
            f"no source is left for the stream: base.sources={list(base)} takes all of {', '.join(corpus.sources)}; "
            "name them in stream.sources to stream what the base was trained on"
        )
    return list(base), list(stream)


def _check_names(key: str, names: Seq[str], known: Seq[str]) -> None:
    for name in names:
        if name not in known:
            raise unknown_name(key, name, known)
        if names.count(name) > 1:
            raise ValueError(f"{key} names {name!r} twice; a source is read once, so name it once")
