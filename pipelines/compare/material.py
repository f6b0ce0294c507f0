"""The data of a comparison, in memory: the stream cut into segments, the base's text, probes of every source.

Shapes: N sequences, S stored tokens (context + 1).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import numpy as np

from pipelines.config.schema import Config
from pipelines.data.module import Setting, open_setting
from pipelines.data.stream import Probe
from pipelines.gate.probe import split_probe
from pipelines.sleep.base import base_sequences

GATE_SEQUENCES = 4
"""Held-out sequences per source that gates look at; their FLOPs count like all others."""


@dataclass(frozen=True)
class Segment:
    """A stretch of the stream between two boundaries, or an equal part of one that has none."""

    name: str
    tokens_NS: np.ndarray
    """int64, in stream order."""
    sources_N: np.ndarray
    """Index of each sequence's source in `Material.sources`."""
    bytes_N: np.ndarray
    """Bytes that each sequence predicts."""


@dataclass(frozen=True)
class Material:
    """Everything that trials of one order share."""

    cfg: Config
    sources: List[str]
    """Sources of the base, then those of the stream in their order."""
    base_sources: List[str]
    segments: List[Segment]
    base: Segment
    """Text of the base mixture; the store may hold it from the start."""
    probes: Dict[str, Probe]
    """Held-out text that methods are judged on."""
    gate_probes: Dict[str, Probe]
    """Other held-out text, for gates."""
    ends: Dict[str, int]
    """Stream position in tokens behind the last sequence of each streamed source."""
    vocab_size: int

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all text that trials read, in its order."""
        found = hashlib.sha256(json.dumps(self.sources).encode())
        texts = [segment.tokens_NS for segment in (*self.segments, self.base)]
        for array in (*texts, *(p.tokens for p in (*self.probes.values(), *self.gate_probes.values()))):
            found.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        return found.hexdigest()

    @property
    def has_base(self) -> bool:
        """Whether there is text that was learned before the stream."""
        return len(self.base.tokens_NS) > 0

    @property
    def stream_bytes(self) -> int:
        """Bytes of the whole stream."""
        return int(sum(segment.bytes_N.sum() for segment in self.segments))

    @property
    def stream_tokens(self) -> int:
        """Predicted tokens of the whole stream."""
        return sum(s.tokens_NS.shape[0] * (s.tokens_NS.shape[1] - 1) for s in self.segments)


def stream_of_folder(overrides: Sequence[str]) -> List[str]:
    """Overrides in which a folder of NAME/train.txt and NAME/valid.txt stands as the glob of just these files."""
    found = []
    for item in overrides:
        key, _, path = item.partition("=")
        folder = key == "stream.path" and list(Path(path).glob("*/train.txt"))
        found.append(f"{key}={path.rstrip('/')}/*/[tv][ra]*.txt" if folder else item)
    return found


def order_sources(sources: Sequence[str], order: str) -> List[str]:
    """The stream's sources in a named order: A, reverse, random-N. ValueError for another name."""
    if order == "A":
        return list(sources)
    if order == "reverse":
        return list(reversed(sources))
    kind, _, seed = order.partition("-")
    if kind == "random" and seed.isdigit():
        return [sources[i] for i in np.random.default_rng(int(seed)).permutation(len(sources))]
    raise ValueError(f"--orders: {order!r} is unknown; use A, reverse, or random-N with a number N")


def load_material(cfg: Config, order: str, scratch: bool = False) -> Material:
    """Read and cut the stream in one order. ValueError where the data is not as configured."""
    if scratch:
        cfg = replace(cfg, base=replace(cfg.base, sources=[], tokens=0))
    opened = open_setting(cfg)
    names = order_sources(opened.stream_sources, order)
    setting = replace(opened, cfg=replace(cfg, stream=replace(cfg.stream, sources=names)), stream_sources=names)
    sources = setting.sources
    keys, rows = _read_stream(setting, sources)
    known = setting.base_sources
    texts = base_sequences(setting.corpus, setting.tokenizer, cfg, known) if known else []
    base = _stack("base", texts, sources)
    judged, gate = {}, {}
    for name, probe in setting.probes().items():
        judged[name], gate[name] = split_probe(probe, GATE_SEQUENCES)
    segments = _cut(cfg, rows, names, sources)
    context, ends = cfg.model.context, {}
    for position, source in enumerate(keys, start=1):
        ends[source] = position * context
    vocab = setting.tokenizer.vocab_size
    return Material(cfg, sources, setting.base_sources, segments, base, judged, gate, ends, vocab)


def _read_stream(setting: Setting, sources: List[str]) -> Tuple[List[str], Segment]:
    sequences = list(setting.stream())
    return [s.source for s in sequences], _stack("stream", sequences, sources)


def _stack(name: str, sequences: Sequence[object], sources: List[str]) -> Segment:
    found = [(s.tokens, sources.index(s.source), s.bytes) for s in sequences]  # type: ignore[attr-defined]
    if not found:
        return Segment(name, np.empty((0, 0), np.int64), np.empty(0, np.int64), np.empty(0, np.int64))
    tokens, indices, sizes = zip(*found, strict=True)
    return Segment(name, np.stack(tokens).astype(np.int64), np.array(indices), np.array(sizes))


def _cut(cfg: Config, rows: Segment, names: List[str], sources: List[str]) -> List[Segment]:
    """At the sources' boundaries where the stream has some, else into as many equal parts as there are sources."""
    total = len(rows.tokens_NS)
    if cfg.stream.schedule == "sequential":
        cuts = [int(i) + 1 for i in np.flatnonzero(np.diff(rows.sources_N))]
        titles = names
    else:
        cuts = [total * i // len(names) for i in range(1, len(names))]
        titles = [f"part {i + 1}" for i in range(len(names))]
    places = list(zip([0, *cuts], [*cuts, total], strict=True))
    assert len(places) == len(titles)
    return [
        Segment(title, rows.tokens_NS[a:b], rows.sources_N[a:b], rows.bytes_N[a:b])
        for title, (a, b) in zip(titles, places, strict=True)
    ]
