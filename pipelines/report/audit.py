"""The audit log: every decision of a run, one JSON line each, chained by hashes so that no change goes unseen.

An entry's hash is taken over its canonical JSON (keys sorted, no spaces), which holds the hash of the entry before it.
Whoever keeps the chain's length and head (the coordinator's state, the releases' indexes) also sees a shortened log.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional

from nl_model.weights import sync

FILE = "audit.jsonl"
GENESIS = "0" * 64
"""Hash before the first entry."""
KINDS = ("promotion", "rejection", "rollback", "plan_change", "sleep_trigger")
Entry = Dict[str, Any]


def entry_hash(entry: Mapping[str, Any]) -> str:
    """Hash of an entry without its own hash."""
    return hashlib.sha256(_canonical({k: v for k, v in entry.items() if k != "hash"})).hexdigest()


@dataclass
class Chain:
    """The end of a log, as its keeper remembers it, with the entries that may not be in the file yet.

    Entries are added to the chain, the chain is saved with the state they belong to, and then they are written to
    the file: a crash in between loses nothing, and doing it again doubles nothing.
    """

    length: int = 0
    head: str = GENESIS
    unwritten: List[Entry] = field(default_factory=list)

    def begin(self) -> None:
        """Forget the entries of the last time; they are in the file."""
        self.unwritten = []

    def add(self, kind: str, **body: Any) -> Entry:
        """Chain one more entry; figures that are not finite become null."""
        assert kind in KINDS, kind
        entry: Entry = {"sequence": self.length, "previous": self.head, "t": round(time.time(), 3), "kind": kind}
        entry.update(_strict(body))
        entry["hash"] = entry_hash(entry)
        self.length, self.head = self.length + 1, entry["hash"]
        self.unwritten.append(entry)
        return entry


class AuditLog:
    """The file. Opened by one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, entries: Sequence[Entry]) -> int:
        """Append the entries that are not there yet, durably; returns how many entries before them are missing.

        A line that a crash tore is cut off first. Where entries are missing the new ones are written all the same: the
        gap stays visible for ever.
        """
        new_file = not self.path.exists()
        with open(self.path, "a+b") as file:
            file.seek(0)
            lines = file.read().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):
                file.truncate(sum(map(len, lines[:-1])))
                lines.pop()
            last = _sequence(lines[-1]) if lines else -1
            fresh = [entry for entry in entries if entry["sequence"] > last]
            file.write(b"".join(_canonical(entry) + b"\n" for entry in fresh))
            file.flush()
            os.fsync(file.fileno())
        if new_file:
            sync(self.path.parent)
        return max(0, fresh[0]["sequence"] - last - 1) if fresh else 0


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    entries: int
    head: str
    errors: List[str]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.errors


def verify(path: Path, length: int, head: str, known: Optional[Mapping[int, str]] = None) -> Verification:
    """Check every byte of a log.

    Args:
        length: entries that the log's keeper remembers.
        head: hash of the last of them.
        known: hashes of further places that others remember, by length of the log at that time.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    errors, previous, hashes = [], GENESIS, [GENESIS]
    for place, line in enumerate(lines):
        entry = _parse(line)
        if entry is None:
            errors.append(f"line {place + 1} is no entry as it was written")
            hashes.append("")
            previous = ""
            continue
        if entry.get("sequence") != place:
            errors.append(f"line {place + 1} is entry {entry.get('sequence')}: entries are missing or in another order")
        if previous and entry.get("previous") != previous:
            errors.append(f"line {place + 1} does not follow the line before it")
        previous = str(entry.get("hash"))
        hashes.append(previous)
    if len(lines) != length:
        errors.append(f"the log has {len(lines)} entries, the run remembers {length}")
    for place, wanted in sorted({**(known or {}), length: head}.items()):
        if place < len(hashes) and hashes[place] != wanted:
            errors.append(f"after {place} entries the run remembers another hash than the log has")
        if place >= len(hashes) and place != length:
            errors.append(f"a release remembers {place} entries")
    return Verification(len(lines), hashes[-1], errors)


def read_audit(path: Path) -> List[Entry]:
    """The entries of a log as they are; lines that are none are left out."""
    lines: Iterable[bytes] = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [entry for line in lines if (entry := _parse(line)) is not None]


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _parse(line: bytes) -> Optional[Entry]:
    """The entry of a line, if the line is exactly what `write` makes of it and its hash is right."""
    try:
        entry = json.loads(line)
        whole = isinstance(entry, dict) and _canonical(entry) + b"\n" == line and entry_hash(entry) == entry.get("hash")
    except (ValueError, RecursionError):
        return None
    return entry if whole else None


def _sequence(line: bytes) -> int:
    entry = _parse(line)
    return int(entry["sequence"]) if entry is not None else -1


def _strict(value: Any) -> Any:
    """The same value in types that strict JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
