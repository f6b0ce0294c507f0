"""What a run reads of its data and what it leaves out, for people: nothing about data is to be silent.

All of it comes from the survey that opened the corpus; no file is read again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Dict, List, Set, Tuple

from pipelines.config.schema import Config
from pipelines.data.documents import Quarantined
from pipelines.data.files import PassedOver
from pipelines.data.module import DataModule

HELD_IN_MEMORY = 256 << 20
"""Bytes of base text from which on it is said that all of it is held in memory."""

STREAM_LIMIT, BASE_LIMIT, NOT_NAMED = "stream limit", "base limit", "not named"
"""Why a source is not read whole. What sets each is said in a note."""


@dataclass(frozen=True)
class SourceFacts:
    """How much a source has and how much of it is read. Bytes and documents are approximate for rows of tables."""

    name: str
    documents: int
    """All usable ones, those held out included."""
    size: int
    """Their bytes."""
    more: bool
    """Whether it has text beyond these (of the installation's texts only as much as needed is looked at)."""
    held_documents: int
    held_size: int
    """Bytes held out for its probe: never trained on."""
    base: int
    """Bytes that the base mixture takes; 0: none."""
    stream: int
    """Bytes that the stream takes; 0: none."""
    why: str
    """Why not all that is not held out is read: of the constants above; empty where it is."""


@dataclass(frozen=True)
class DataFacts:
    """What is read, from which sources, and what is not."""

    sources: Tuple[SourceFacts, ...]
    """Those of the base, those of the stream, then those that are not read."""
    notes: Tuple[str, ...]
    """What was decided because nothing was said, a sentence each."""
    left_out: Tuple[str, ...]
    """Documents quarantined and files passed over, a line per source and kind."""


def data_facts(setting: DataModule) -> DataFacts:
    """The facts about the data of a run, from what was counted when its corpus was opened."""
    corpus = setting.corpus
    rest = [name for name in corpus.sources if name not in setting.sources]
    sources = tuple(_source(setting, name) for name in [*setting.sources, *rest])
    left_out = [*_quarantined(corpus.quarantined), *map(_passed_over, corpus.passed_over)]
    return DataFacts(sources, tuple(_notes(setting, sources)), tuple(left_out))


def _source(setting: DataModule, name: str) -> SourceFacts:
    cfg, parts = setting.cfg, setting.corpus.parts(name)
    reads: List[int] = []
    reasons: List[str] = []
    for names, limit, reason in (
        (setting.base_sources, cfg.base_source_bytes, BASE_LIMIT if cfg.base.max_source_bytes else STREAM_LIMIT),
        (setting.stream_sources, cfg.stream.limit, STREAM_LIMIT),
    ):
        reads.append(_at_most(parts.size, limit) if name in names else 0)
        if name in names and reads[-1] < parts.size:
            reasons.append(reason)
    if not any(reads):
        reasons.append(NOT_NAMED)
    return SourceFacts(
        name,
        parts.documents + parts.held_documents,
        parts.size + parts.held_size,
        parts.more,
        parts.held_documents,
        parts.held_size,
        reads[0],
        reads[1],
        ", ".join(dict.fromkeys(reasons)),
    )


def _at_most(size: int, limit: int) -> int:
    return min(size, limit) if limit else size


def _notes(setting: DataModule, sources: Tuple[SourceFacts, ...]) -> List[str]:
    cfg, notes = setting.cfg, []
    own = cfg.stream.path is not None
    notes.extend(_reasons(cfg, {reason for source in sources for reason in source.why.split(", ")}))
    if own and not cfg.stream.limit:
        notes.append("stream.max_source_bytes=0: no limit, every source of the stream is read to its end")
    if cfg.base.checkpoint is not None and not setting.base_sources:
        notes.append(
            "base.checkpoint without base.sources: nothing of what the checkpoint knows can be replayed or is guarded "
            "by the gate; name sources of such text in base.sources"
        )
    if own and setting.base_sources and not cfg.base.sources:
        notes.append(_default_base(setting))
    if sum(source.base for source in sources) > HELD_IN_MEMORY:
        notes.append("all text of the base is held in memory; base.max_source_bytes bounds it per source")
    if any(source.held_size > 4 * cfg.stream.probe_bytes for source in sources):
        notes.append(f"about {cfg.stream.probe_bytes:,} bytes of what is held out are measured on (stream.probe_bytes)")
    return notes


def _reasons(cfg: Config, given: Set[str]) -> List[str]:
    """What sets the limits that are met."""
    said = {
        STREAM_LIMIT: f"stream.max_source_bytes={cfg.stream.limit} bytes of each source; 0 reads all",
        BASE_LIMIT: f"base.max_source_bytes={cfg.base.max_source_bytes} bytes of each source of the base",
        NOT_NAMED: "in neither stream.sources nor base.sources, so not read",
    }
    return [f"{reason}: {text}" for reason, text in said.items() if reason in given]


def _default_base(setting: DataModule) -> str:
    names = ", ".join(setting.base_sources)
    few = "first source is" if len(setting.base_sources) == 1 else f"first {len(setting.base_sources)} sources are"
    streamed = ", and streamed as well" if set(setting.base_sources) & set(setting.stream_sources) else ""
    return (
        f"base.sources is not given: the {few} pretrained on as the base ({names}){streamed}; "
        "base.sources=[...] names others"
    )


def _quarantined(items: List[Quarantined]) -> List[str]:
    """A line per source: how much was quarantined, and the first reason."""
    counts, sizes = Counter(item.source for item in items), Counter[str]()
    first: Dict[str, Quarantined] = {}
    for item in items:
        sizes[item.source] += item.size
        first.setdefault(item.source, item)
    return [
        f"quarantined of {name}: {_count(counts[name], 'document')}, {sizes[name]:,} bytes; "
        f"{item.origin}: {item.reason}"
        for name, item in first.items()
    ]


def _passed_over(item: PassedOver) -> str:
    return f"not read: {item.kind}, {item.count:,} ({item.example}{', ...' if item.count > 1 else ''}): {item.reason}"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"
