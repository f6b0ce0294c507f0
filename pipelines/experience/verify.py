"""Audit of a store on disk: read every byte that counts, and report what is wrong. Changes nothing, needs no lock."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipelines.experience.manifest import Entry, Manifest, State
from pipelines.experience.schema import DREAM_KEY, make_schema
from pipelines.experience.segment import END_OF_STREAM, Extent, SegmentReader, count_sources, segment_path


@dataclass
class VerifyReport:
    """What `verify` found. Orphans are leftovers of a crash, which the next opening cuts off; errors are damage."""

    versions: int = 0
    """Manifest entries that were read."""
    segments: int = 0
    """Segments that the manifest names."""
    committed: int = 0
    """Rows that the newest manifest entry counts."""
    rows: int = 0
    """Rows found intact."""
    duplicates: int = 0
    """Rows whose key had been seen before."""
    missing_keys: int = 0
    """Keys that should be there and were not found intact."""
    orphans: int = 0
    """Files that no manifest entry names."""
    orphan_bytes: int = 0
    """Bytes of orphans, and bytes behind the committed end of segments."""
    errors: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing that was committed is missing, damaged or doubled."""
        return not (self.errors or self.duplicates or self.missing_keys)


@dataclass(frozen=True)
class SegmentInfo:
    """One segment, as the manifest has it. Bytes are those on disk (0 if the file is missing)."""

    segment: int
    rows: int
    bytes: int
    sealed: bool
    sources: dict[str, int]
    min_key: int
    max_key: int


def list_store(path: str | Path) -> list[SegmentInfo]:
    """Segments of the newest version, by number. Raises ValueError if there is no store or its manifest is damaged."""
    path = Path(path)
    state = _manifest(path).load()
    listed = []
    for number, extents in _by_segment(state.extents).items():
        sources: Counter[str] = Counter()
        for extent in extents:
            sources.update(extent.sources)
        file = segment_path(path, number)
        listed.append(
            SegmentInfo(
                segment=number,
                rows=sum(extent.rows for extent in extents),
                bytes=file.stat().st_size if file.exists() else 0,
                sealed=number in state.sealed,
                sources=dict(sources),
                min_key=min(extent.min_key for extent in extents),
                max_key=max(extent.max_key for extent in extents),
            )
        )
    return listed


def verify(path: str | Path) -> VerifyReport:
    """Re-read manifest and segments of the store at `path`. Raises ValueError only if there is no store."""
    path = Path(path)
    report = VerifyReport()
    state = _check_manifest(_manifest(path), report)
    if not state.entry.version:
        return report
    keys = _check_extents(path, state, report)
    _check_ends(path, state, report)
    distinct = np.unique(keys)
    entry = state.entry
    expected = np.arange(-entry.base_rows, entry.last_key + 1)
    report.rows, report.committed = len(keys), entry.rows
    report.duplicates = len(keys) - len(distinct)
    real, dreams = distinct[distinct < DREAM_KEY], distinct[distinct >= DREAM_KEY]
    # Keys of dreams leave gaps between rounds, so those are counted; every other key is known by number.
    report.missing_keys = len(np.setdiff1d(expected, real, assume_unique=True)) + max(0, entry.dreams - len(dreams))
    if len(real) and (real[0] < expected[0] or real[-1] > expected[-1]):
        report.errors.append(f"keys {real[0]}..{real[-1]} reach beyond the manifest's {expected[0]}..{expected[-1]}")
    if len(dreams) > entry.dreams or (len(dreams) and dreams[-1] > entry.last_dream):
        report.errors.append(f"{len(dreams)} dreams up to key {dreams[-1]} are more than the manifest's {entry.dreams}")
    _find_orphans(path, state, report)
    return report


def verify_recent(path: str | Path, max_bytes: int) -> int:
    """Check the newest extents of the store, up to about `max_bytes`; returns the bytes checked (0: nothing there).

    Raises ValueError naming file, offset, expected and found at the first damage. Cheap where `verify` would take long.
    """
    path = Path(path)
    manifest = Manifest(path)
    if not manifest.directory.is_dir() or not (manifest.versions() or manifest.checkpoints()):
        return 0
    state = manifest.load()
    schema = make_schema(state.entry.context, state.entry.dtype, state.entry.format)
    readers: dict[int, SegmentReader] = {}
    checked = 0
    for extent in reversed(state.extents):
        if checked >= max_bytes:
            break
        readers.setdefault(extent.segment, SegmentReader(path, extent.segment, schema)).batch(extent)
        checked += extent.length
    return checked


def _manifest(path: Path) -> Manifest:
    manifest = Manifest(path)
    if not manifest.directory.is_dir():
        raise ValueError(f"{path} is not an experience store (it has no directory 'manifest')")
    return manifest


def _check_manifest(manifest: Manifest, report: VerifyReport) -> State:
    """Replay the whole log, going on after damage as well as can be; compare every checkpoint with the replay."""
    state = State()
    checkpoints = set(manifest.checkpoints())
    intact = True
    for version in range(1, max([*manifest.versions(), *checkpoints], default=0) + 1):
        try:
            entry = manifest.read(version)
        except FileNotFoundError:
            report.errors.append(f"{manifest.entry_path(version)} is missing")
            intact = False
            continue
        except ValueError as error:
            report.errors.append(str(error))
            intact = False
            continue
        report.versions += 1
        intact = _follow(state, entry, report, intact)
        if version in checkpoints:
            _check_checkpoint(manifest, state, report, intact)
    return state


def _follow(state: State, entry: Entry, report: VerifyReport, intact: bool) -> bool:
    before = Counter(state.entry.by_source)
    try:
        state.apply(entry)
    except ValueError as error:
        if intact:
            report.errors.append(str(error))
        state.entry = Entry(**{**vars(entry), "version": entry.version - 1, "crc": entry.previous})
        state.apply(entry)
        return False
    for extent in entry.extents:
        before.update(extent.sources)
    if intact and (before != Counter(entry.by_source) or before.total() != entry.rows):
        report.errors.append(f"manifest entry {entry.version} counts {entry.by_source}, its extents {dict(before)}")
    return intact


def _check_checkpoint(manifest: Manifest, state: State, report: VerifyReport, intact: bool) -> None:
    path = manifest.checkpoint_path(state.entry.version)
    try:
        saved = manifest.read_checkpoint(state.entry.version)
    except ValueError as error:
        report.errors.append(f"{error}; the log is complete without it, so it may be deleted")
        return
    found = (saved.entry.crc, saved.extents, saved.sealed)
    if intact and found != (state.entry.crc, state.extents, state.sealed):
        report.errors.append(f"{path} differs from the log; it may be deleted")


def _check_extents(path: Path, state: State, report: VerifyReport) -> np.ndarray:
    """Keys of all intact rows."""
    schema = make_schema(state.entry.context, state.entry.dtype, state.entry.format)
    keys = [np.empty(0, np.int64)]
    for number, extents in _by_segment(state.extents).items():
        report.segments += 1
        reader, end = SegmentReader(path, number, schema), 0
        for extent in extents:
            if extent.offset != end:
                report.errors.append(f"{reader.path}: extents leave or share bytes {end}..{extent.offset}")
            end = extent.end
            try:
                batch = reader.batch(extent)
            except ValueError as error:
                report.errors.append(str(error))
                continue
            found = batch.column("key").to_numpy()
            keys.append(found)
            if not np.array_equal(found, extent.keys()) or count_sources(batch) != extent.sources:
                report.errors.append(f"{reader.path} at byte {extent.offset}: keys or sources differ from the manifest")
    return np.concatenate(keys)


def _check_ends(path: Path, state: State, report: VerifyReport) -> None:
    for number, extents in _by_segment(state.extents).items():
        file, end = segment_path(path, number), extents[-1].end
        if not file.exists():
            continue  # reported when its extents were read
        surplus = file.stat().st_size - end
        if number in state.sealed:
            surplus -= len(END_OF_STREAM)
            with file.open("rb") as stream:
                stream.seek(end)
                marker = stream.read(len(END_OF_STREAM))
            if marker != END_OF_STREAM:
                report.errors.append(f"{file}: sealed, but no end-of-stream marker at byte {end}")
        report.orphan_bytes += max(0, surplus)


def _find_orphans(path: Path, state: State, report: VerifyReport) -> None:
    named = {segment_path(path, extent.segment) for extent in state.extents}
    strangers = [file for file in (path / "segments").iterdir() if file not in named]
    strangers += Manifest(path).temporaries()
    report.orphans += len(strangers)
    report.orphan_bytes += sum(file.stat().st_size for file in strangers)


def _by_segment(extents: list[Extent]) -> dict[int, list[Extent]]:
    grouped: dict[int, list[Extent]] = {}
    for extent in extents:
        grouped.setdefault(extent.segment, []).append(extent)
    return grouped
