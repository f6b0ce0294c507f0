"""The files below a path that text is read from, and how many others there are, by kind and with the reason.

What is not read is counted, never just passed over: a folder that was linked or compressed is easily missed.
"""

from __future__ import annotations

import glob
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Deque, Dict, Iterator, List, Set, Tuple

EXTENSIONS = (".txt", ".md", ".jsonl", ".parquet")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".tar", ".tgz")
_ROWS = (".json", ".ndjson", ".jsonlines")
HIDDEN = "hidden"
LOOPS = "links to folders that are read already"
NOT_FILES = "neither files nor folders"
UNREADABLE = "folders that cannot be listed"
EMPTY = "files without text"
_REASONS = {
    HIDDEN: "names that begin with a dot are not read; rename them",
    LOOPS: "each folder is read once",
    NOT_FILES: "links that lead nowhere, pipes or devices; remove or mend them",
    UNREADABLE: "check their permissions",
    EMPTY: "nothing in them is a document",
}


@dataclass(frozen=True)
class PassedOver:
    """Files of one kind that are not read."""

    kind: str
    """An ending such as `.gz`, or one of the words above."""
    count: int
    example: str
    """The first of them by name, relative to the root."""
    reason: str
    """Why they are not read, and what to do about it."""


@dataclass(frozen=True)
class FoundFiles:
    """What lies below a path."""

    root: Path
    """What names are relative to."""
    files: Tuple[Path, ...]
    """In the order they are read in."""
    passed_over: Tuple[PassedOver, ...]


class Skipped:
    """Counts what is passed over, by kind."""

    def __init__(self) -> None:
        self._names: Dict[str, Tuple[int, str]] = {}

    def add(self, kind: str, name: str) -> None:
        """Count one more of a kind."""
        count, first = self._names.get(kind, (0, name))
        self._names[kind] = count + 1, min(first, name)

    def counted(self) -> Tuple[PassedOver, ...]:
        """All kinds, the most frequent first."""
        found = [PassedOver(kind, count, name, _reason(kind)) for kind, (count, name) in self._names.items()]
        return tuple(sorted(found, key=lambda item: (-item.count, item.kind)))


def _reason(kind: str) -> str:
    if kind in _REASONS:
        return _REASONS[kind]
    if kind in _COMPRESSED:
        return "compressed files are not read; decompress them"
    if kind in _ROWS:
        return "rename them to .jsonl where every line is an object, else convert them"
    example = f"**/*{kind}" if kind.startswith(".") else "**/*"
    return f"a folder is read for {', '.join(EXTENSIONS)}; a glob such as 'DIR/{example}' reads others as plain text"


def find_files(text: str) -> FoundFiles:
    """The files of a directory, a file or a glob, in sorted order; links to folders are followed, each folder once.

    Raises ValueError for a path that does not exist and for one that holds nothing to read.
    """
    path, skipped = Path(text), Skipped()
    if path.is_dir():
        root, files = path, list(_supported(path, skipped))
        if not files:
            raise ValueError(
                f"stream.path={text!r} holds no {', '.join(EXTENSIONS)} file{_others(skipped)}; "
                "convert the data, or give a glob such as 'DIR/**/*.py' for plain text of another name"
            )
    elif path.is_file():
        root, files = path.parent, [path]
    elif glob.has_magic(str(path)):
        root = Path(*path.parts[: next(i for i, part in enumerate(path.parts) if glob.has_magic(part))])
        files = list(_matches(path, root, skipped))
        if not files:
            raise ValueError(f"stream.path={text!r} matches no file; check the pattern (** goes into subdirectories)")
    else:
        raise ValueError(f"stream.path={text!r} does not exist; give a directory, a file or a glob")
    visible = [file for file in files if not _is_hidden(name_of(file, root))]
    for file in set(files) - set(visible):
        skipped.add(HIDDEN, name_of(file, root))
    if not visible:
        raise ValueError(f"stream.path={text!r} holds hidden files only; rename them")
    # Beside a train file, others of a folder ("more", "extra") come second.
    order = sorted(set(visible), key=lambda file: (not file.stem.startswith("train"), name_of(file, root)))
    return FoundFiles(root, tuple(order), skipped.counted())


def name_of(path: Path, root: Path) -> str:
    """A file's name relative to the root."""
    return path.relative_to(root).as_posix()


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _others(skipped: Skipped) -> str:
    kinds = [f"{item.count} {item.kind}" for item in skipped.counted()[:3]]
    return f" (but {', '.join(kinds)})" if kinds else ""


def _matches(pattern: Path, root: Path, skipped: Skipped) -> Iterator[Path]:
    """Files that a glob matches. `**` follows links, round and round; of several ways to a file the shortest counts."""
    found = [Path(name) for name in glob.glob(str(pattern), recursive=True)]
    seen: Set[Path] = set()
    for path in sorted((path for path in found if path.is_file()), key=lambda path: (len(path.parts), path.as_posix())):
        place = path.parent.resolve() / path.name
        if place in seen:
            skipped.add(LOOPS, name_of(path, root))
        else:
            seen.add(place)
            yield path


def _supported(root: Path, skipped: Skipped) -> Iterator[Path]:
    for path in _walk(root, skipped):
        kind = path.suffix.lower()
        if kind in EXTENSIONS and not path.is_file():
            skipped.add(NOT_FILES, name_of(path, root))
        elif kind in EXTENSIONS or _is_hidden(name_of(path, root)):
            yield path  # hidden ones are counted together with those of globs
        else:
            skipped.add(kind or "files without an ending", name_of(path, root))


def _walk(root: Path, skipped: Skipped) -> Iterator[Path]:
    """Files below a folder. Links wait until all that is there itself was seen: a name of its own goes before a link's.

    A link into a folder that was seen, or to one that it lies in, is not followed.
    """
    seen: Set[Tuple[int, int]] = set()
    waiting: Deque[Path] = deque([root])

    def unreadable(error: OSError) -> None:
        skipped.add(UNREADABLE, name_of(Path(error.filename), root))

    while waiting:
        top = waiting.popleft()
        for folder, folders, names in os.walk(top, onerror=unreadable):
            here = os.stat(folder)
            if (here.st_dev, here.st_ino) in seen:
                skipped.add(LOOPS, name_of(Path(folder), root))
                folders.clear()
                continue
            seen.add((here.st_dev, here.st_ino))
            for name in [name for name in folders if name.startswith(".")]:
                skipped.add(HIDDEN, name_of(Path(folder, name), root))
                folders.remove(name)
            waiting.extend(_links(Path(folder), sorted(folders), root, skipped))
            yield from (Path(folder, name) for name in names)


def _links(folder: Path, names: List[str], root: Path, skipped: Skipped) -> List[Path]:
    """Links to folders that do not lead back to where they are."""
    real, found = folder.resolve(), []
    for path in (folder / name for name in names):
        if path.is_symlink():
            target = path.resolve()
            if target == real or target in real.parents or target in root.resolve().parents:
                skipped.add(LOOPS, name_of(path, root))
            else:
                found.append(path)
    return found
