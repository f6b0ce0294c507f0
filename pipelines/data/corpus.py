"""Files into named sources of documents, with held-out probes and a quarantine for what cannot be used."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple

import numpy as np

from pipelines.config.schema import StreamConfig
from pipelines.data.documents import Corpus, Document, Quarantined, SourceParts, check_sources, keyed_order
from pipelines.data.files import EMPTY, EXTENSIONS, Skipped, find_files, name_of
from pipelines.data.installed import open_installed
from pipelines.data.parquet import ParquetPart, survey_parquet
from pipelines.data.readers import BLOCK_BYTES, Fields, JsonlPart, Part, TextPart, read_error, survey_jsonl

__all__ = ["EXTENSIONS", "Corpus", "Document", "Quarantined", "open_corpus"]

_HELD_OUT_NAME = re.compile(r"(valid(ation)?|test|held[-_]?out)(?![a-z])", re.IGNORECASE)
_SURVEY_ROWS = 4096
_FEWEST_DOCUMENTS = 16
_SMALLEST_BLOCK = 512


@dataclass(eq=False)
class _Tally:
    """What one file has for one source, and the documents of it that would be held out (those of smallest hash)."""

    part: Part
    name: str
    """The file, relative to the root: moving the data moves no document between training and probe."""
    held_out: bool
    size: int = 0
    count: int = 0
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    positions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    sizes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def add(self, positions: np.ndarray, sizes: np.ndarray, wanted: int) -> None:
        """Count documents at `positions` (n,) of `sizes` (n,) bytes; keep candidates worth `wanted` bytes."""
        self.size += int(sizes.sum())
        self.count += len(positions)
        keys = _mix(positions.astype(np.uint64) ^ np.uint64(keyed_order(self.name)))
        keys = np.concatenate([self.keys, keys])
        order = np.argsort(keys, kind="stable")
        sizes = np.concatenate([self.sizes, sizes])[order]
        kept = 1 + int(np.searchsorted(np.cumsum(sizes), wanted))
        self.keys, self.sizes = keys[order][:kept], sizes[:kept]
        self.positions = np.concatenate([self.positions, positions])[order][:kept]


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64, (n,) uint64 to (n,) uint64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def open_corpus(cfg: StreamConfig) -> Corpus:
    """Find the files of `cfg.path`, check them, and name their sources; without a path, the installation's own texts.

    Files directly below the root (or the fixed part of a glob) are sources by their stem; a folder there is one source,
    whose valid*, test* and heldout* files are its probe. Rows of JSONL and Parquet that name a source belong to that.
    Plain text and JSONL are read through once. Raises ValueError for a missing path, no supported file, bytes that
    are not UTF-8, broken JSON, a Parquet without the text column, a source without a usable document, and names
    in `cfg.sources` that no source has.
    """
    if cfg.path is None:
        return open_installed(cfg)
    found_files = find_files(cfg.path)
    root, skipped = found_files.root, Skipped()
    groups: Dict[str, List[Path]] = {}
    for path in found_files.files:
        inner = path.relative_to(root).parts
        groups.setdefault(inner[0] if len(inner) > 1 else path.stem, []).append(path)
    tallies: Dict[str, List[_Tally]] = {}
    quarantined: List[Quarantined] = []
    for name, members in sorted(groups.items()):
        left_out: List[Quarantined] = []
        usable = 0
        for path in members:
            found, problems = _survey(path, name_of(path, root), name, len(members) == 1, cfg)
            left_out += problems
            if not found and not problems:
                skipped.add(EMPTY, name_of(path, root))
            for source, tally in found.items():
                tallies.setdefault(source, []).append(tally)
                usable += tally.count
        if not usable:
            raise _empty(name, members, left_out)
        quarantined += left_out
    corpus = Corpus(
        {source: _divide(found, cfg.probe_bytes) for source, found in tallies.items()},
        cfg.max_document_bytes,
        quarantined,
        (*found_files.passed_over, *skipped.counted()),
    )
    check_sources(corpus, cfg)
    return corpus


def _empty(name: str, members: Sequence[Path], left_out: Sequence[Quarantined]) -> ValueError:
    reason = f"; {left_out[0].origin} was quarantined: {left_out[0].reason}" if left_out else ""
    files = ", ".join(str(path) for path in members[:3]) + (", ..." if len(members) > 3 else "")
    size = sum(path.stat().st_size for path in members)
    return ValueError(f"source {name!r} has no usable document ({files}: {size} bytes{reason}); remove or fill it")


def _survey(
    path: Path, name: str, group: str, lone: bool, cfg: StreamConfig
) -> Tuple[Dict[str, _Tally], List[Quarantined]]:
    """Read a file as far as its checks need it: what it has for each source, and what had to be left out."""
    held_out = "/" in name and _HELD_OUT_NAME.match(path.stem) is not None
    found: Dict[str, _Tally] = {}
    quarantined: List[Quarantined] = []
    part_of, batches = _reader(path, group, lone, cfg, quarantined)
    for source, positions, sizes in batches:
        if source not in found:
            found[source] = _Tally(part_of(source), name, held_out)
        found[source].add(positions, sizes, cfg.probe_bytes)
    return found, quarantined


_Batches = Iterator[Tuple[str, np.ndarray, np.ndarray]]


def _reader(
    path: Path, group: str, lone: bool, cfg: StreamConfig, quarantined: List[Quarantined]
) -> Tuple[Callable[[str], Part], _Batches]:
    """How to read one source of a file, and the (source, positions, sizes) of all its documents."""
    fields = Fields(cfg.text_field, cfg.source_field, group)
    limit = cfg.max_document_bytes
    if path.suffix.lower() == ".parquet":
        return lambda source: ParquetPart(path, fields, source, limit), survey_parquet(path, fields)
    if path.suffix.lower() == ".jsonl":
        rows = _batched(path, survey_jsonl(path, fields, limit), quarantined)
        return lambda source: JsonlPart(path, fields, source, limit), rows
    try:
        size = path.stat().st_size
    except OSError as error:
        raise read_error(path, error) from None
    # A source of one file can only hold out documents of it, so even a short one is cut into several.
    block = min(BLOCK_BYTES, max(_SMALLEST_BLOCK, size // _FEWEST_DOCUMENTS)) if lone else BLOCK_BYTES
    part = TextPart(path, block, limit)
    return lambda source: part, _batched(path, ((group, *entry) for entry in part.survey()), quarantined)


def _batched(
    path: Path, entries: Iterable[Tuple[str, int, int, Optional[str]]], quarantined: List[Quarantined]
) -> _Batches:
    """Documents gathered by source; those with a problem go to `quarantined`."""
    waiting: Dict[str, List[Tuple[int, int]]] = {}
    for source, position, size, problem in entries:
        if problem is not None:
            quarantined.append(Quarantined(source, f"{path}#{position}", problem, size))
            continue
        rows = waiting.setdefault(source, [])
        rows.append((position, size))
        if len(rows) == _SURVEY_ROWS:
            yield source, *np.array(waiting.pop(source), dtype=np.int64).T
    for source, rows in waiting.items():
        yield source, *np.array(rows, dtype=np.int64).T


def _divide(tallies: List[_Tally], wanted: int) -> SourceParts:
    """Training and probe of one source: files meant as probes, else whole files, else documents at hashed places."""
    total = sum(tally.size for tally in tallies)
    probes = [tally for tally in tallies if tally.held_out]
    train = [tally for tally in tallies if not tally.held_out]
    if not train:
        probes, train = [], probes
    if probes:
        return _parts(train, probes)
    wanted = min(wanted, max(1, total // 5))
    held: List[_Tally] = []
    for tally in sorted(train, key=lambda tally: keyed_order(tally.name)):
        # One file must not take a large share of a source with it.
        if sum(item.size for item in held) < wanted and tally.size <= total // 8:
            held.append(tally)
    if sum(item.size for item in held) >= wanted:
        return _parts([tally for tally in train if tally not in held], held)
    rows = [
        (int(key), number, int(position), int(size))
        for number, tally in enumerate(train)
        for key, position, size in zip(tally.keys, tally.positions, tally.sizes, strict=True)
    ]
    chosen: Set[Tuple[int, int]] = set()
    size = 0
    for _, number, position, length in sorted(rows):
        if size >= wanted or len(chosen) + 1 >= sum(tally.count for tally in train):
            break
        chosen.add((number, position))
        size += length
    count = sum(tally.count for tally in train) - len(chosen)
    parts = tuple(tally.part for tally in train)
    return SourceParts(parts, (), frozenset(chosen), total - size, count, size, len(chosen))


def _parts(train: List[_Tally], probes: List[_Tally]) -> SourceParts:
    return SourceParts(
        tuple(tally.part for tally in train),
        tuple(tally.part for tally in probes),
        size=sum(tally.size for tally in train),
        documents=sum(tally.count for tally in train),
        held_size=sum(tally.size for tally in probes),
        held_documents=sum(tally.count for tally in probes),
    )
