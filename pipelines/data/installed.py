"""The default corpus: texts that the installation itself brings onto any machine. Nothing is imported to find them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sysconfig
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Set, Tuple

from pipelines.config.schema import StreamConfig
from pipelines.data.documents import Corpus, SourceParts, check_sources, keyed_order
from pipelines.data.readers import Part, Row

DEFAULT_BASE = ("docs", "python")
"""Sources of the base when no path is given: English prose about software, and Python."""
DEFAULT_ORDER = ("cpp", "unicode", "javascript", "fonts")
"""Sources of the stream when no path is given. Further ones, by name only: operators, stubs, styles."""

_PIECE = 24 * 1024
_SHORTEST = 400
_LONGEST_LINE = 400
_FEWEST_PROBES = 4
_NOT_PYTHON = {"__pycache__", "encodings", "site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
_NUMBERED_NAME = re.compile(r"-[0-9A-F]{4,6}$|^HANGUL SYLLABLE ")
_CODE_POINTS = 128
_LAST_CODE_POINT = 0x20000


@dataclass(frozen=True)
class _Piece:
    """Up to 24 KiB of a file, from byte `start` on, trimmed to whole lines, statements or entries."""

    path: Path
    name: str
    """Path relative to where the installation keeps it: decides the order, on every machine the same."""
    start: int
    trim: Callable[[bytes, bool], bytes]

    @property
    def origin(self) -> str:
        """Name of the file, and where the piece starts in it."""
        return self.name if self.start == 0 else f"{self.name}@{self.start}"

    def rows(self, start: int = 0) -> Iterator[Row]:
        """One document, or none where the file is not UTF-8."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            data = file.read(_PIECE)
        try:
            text = self.trim(data, self.start > 0).decode("utf-8")
        except UnicodeDecodeError:
            return
        yield Row(0, text, len(text.encode("utf-8")))


@dataclass(frozen=True)
class _Characters:
    """A table of the names of 128 code points, in one of four layouts."""

    first: int

    @property
    def origin(self) -> str:
        """The first code point of the table."""
        return f"unicodedata:U+{self.first:04X}"

    def rows(self, start: int = 0) -> Iterator[Row]:
        """One document; empty where none of the code points has a name of its own."""
        layout = keyed_order(self.origin) % 4
        lines = []
        for point in range(self.first, self.first + _CODE_POINTS):
            sign = chr(point)
            name = unicodedata.name(sign, "")
            if name and not _NUMBERED_NAME.search(name):
                lines.append(_character_line(layout, point, sign, name))
        text = "".join(lines)
        yield Row(0, text, len(text.encode("utf-8")))


def _character_line(layout: int, point: int, sign: str, name: str) -> str:
    kind = unicodedata.category(sign)
    if layout == 0:
        return f"U+{point:04X} {name}\n"
    if layout == 1:
        return f"{point:04X};{name};{kind};{unicodedata.bidirectional(sign)};{unicodedata.decomposition(sign)}\n"
    if layout == 2:
        return f"{sign}\t{name.lower()}\n"
    return f"&#{point}; is {name.capitalize()} ({kind})\n"


def _lines(data: bytes, inside: bool) -> bytes:
    """Whole lines; a file that fits is kept as it is."""
    begin = data.find(b"\n") + 1 if inside else 0
    end = data.rfind(b"\n") + 1 if len(data) == _PIECE else len(data)
    return data[begin:end]


def _entries(data: bytes, inside: bool) -> bytes:
    """Whole entries of a YAML list."""
    begin = data.find(b"\n- ") + 1 if inside else 0
    end = data.rfind(b"\n- ") + 1 if len(data) == _PIECE else len(data)
    return data[begin:end]


def _statements(data: bytes, inside: bool) -> bytes:
    """One statement per line: bundled scripts are minified to single lines. Embedded data are dropped."""
    lines = re.sub(rb"([;}])(?=[^\n])", rb"\1\n", data).split(b"\n")
    # The first and the last may be cut inside a statement, or even inside a character.
    whole = lines[1 if inside else 0 : -1 if len(data) == _PIECE else None]
    return b"\n".join(line for line in whole if 0 < len(line) <= _LONGEST_LINE) + b"\n"


def _description(data: bytes, inside: bool) -> bytes:
    """The long description of a package: what follows the headers of its METADATA."""
    _, _, body = data.partition(b"\n\n")
    return body[: body.rfind(b"\n") + 1] if len(data) == _PIECE else body


def _package(name: str) -> Optional[Path]:
    """Folder of a top-level package, found without importing it."""
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None


def _walk(root: Optional[Path], suffixes: Tuple[str, ...], skip: Iterable[str] = ()) -> Iterator[Tuple[Path, str]]:
    """(file, name relative to the root's parent) of files with one of the suffixes; folders in `skip` are left out."""
    if root is None:
        return
    skipped = set(skip)
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in skipped)
        for name in sorted(files):
            if name.endswith(suffixes):
                path = Path(folder, name)
                yield path, path.relative_to(root.parent).as_posix()


def _pieces(
    files: Iterable[Tuple[Path, str]], trim: Callable[[bytes, bool], bytes] = _lines, most: int = 1
) -> Iterator[Part]:
    """The first `most` pieces of each file."""
    for path, name in files:
        # Only files of which several pieces are taken have to be measured.
        size = path.stat().st_size if most > 1 else 1
        for start in range(0, min(size, most * _PIECE), _PIECE):
            yield _Piece(path, name, start, trim)


def _docs() -> Iterator[Part]:
    """Long descriptions and licences of installed packages."""
    for site in sorted({str(dist.locate_file("")) for dist in importlib.metadata.distributions()}):
        for info in sorted(Path(site).glob("*.dist-info")):
            # The version is left out of the name, so that an upgrade does not shuffle everything.
            package = info.name.split("-")[0]
            for path, name in _walk(info, ("",)):
                inner = name.split("/", 1)[1]
                if inner == "METADATA":
                    yield _Piece(path, f"{package}/{inner}", 0, _description)
                elif re.search(r"licen[sc]e|notice|copying", inner.rsplit("/", 1)[-1], re.IGNORECASE):
                    yield _Piece(path, f"{package}/{inner}", 0, _lines)


def _python() -> Iterator[Part]:
    files = _walk(Path(sysconfig.get_path("stdlib")), (".py",), _NOT_PYTHON)
    return _pieces((path, name) for path, name in files if "_sysconfigdata" not in name)


def _cpp() -> Iterator[Part]:
    torch = _package("torch")
    for folder in ("ATen", "c10", "torch"):
        # ATen/ops holds thousands of generated headers that are all alike.
        yield from _pieces(_walk(torch and torch / "include" / folder, (".h", ".hpp", ".cuh"), ("ops",)))


def _javascript() -> Iterator[Part]:
    for name in ("mlflow", "ray"):
        yield from _pieces(_walk(_built(name), (".js",)), _statements)


def _styles() -> Iterator[Part]:
    for name in ("mlflow", "ray"):
        yield from _pieces(_walk(_built(name), (".css",)), _statements, most=40)


def _built(name: str) -> Optional[Path]:
    """Where a package keeps the bundled pages of its web interface."""
    package = _package(name)
    return package and package / {"mlflow": "server/js/build", "ray": "dashboard/client/build"}[name]


def _fonts() -> Iterator[Part]:
    matplotlib = _package("matplotlib")
    return _pieces(_walk(matplotlib and matplotlib / "mpl-data" / "fonts", (".afm",)))


def _operators() -> Iterator[Part]:
    torchgen = _package("torchgen")
    return _pieces(_walk(torchgen and torchgen / "packaged", (".yaml",)), _entries, most=64)


def _stubs() -> Iterator[Part]:
    torch = _package("torch")
    for root in (_package("numpy"), _package("matplotlib"), torch and torch / "_C"):
        yield from _pieces(_walk(root, (".pyi",), ("tests",)), most=8)


def _unicode() -> Iterator[Part]:
    return (_Characters(first) for first in range(0, _LAST_CODE_POINT, _CODE_POINTS))


_FINDERS: Dict[str, Callable[[], Iterator[Part]]] = {
    "cpp": _cpp,
    "docs": _docs,
    "fonts": _fonts,
    "javascript": _javascript,
    "operators": _operators,
    "python": _python,
    "stubs": _stubs,
    "styles": _styles,
    "unicode": _unicode,
}


def open_installed(cfg: StreamConfig) -> Corpus:
    """The corpus that needs no data: the same for the same installation, in the same order, with the same probes.

    Files of a source are mixed by a hash of their names; the first make its probe, the rest, up to twice
    `cfg.limit`, its training text. Raises ValueError for names in `cfg.sources` that do not exist.
    """
    parts: Dict[str, SourceParts] = {}
    for source, finder in _FINDERS.items():
        found = _select(sorted(finder(), key=lambda part: keyed_order(part.origin)), cfg)
        if found is not None:
            parts[source] = found
    corpus = Corpus(parts, cfg.max_document_bytes)
    check_sources(corpus, cfg)
    return corpus


def _select(candidates: List[Part], cfg: StreamConfig) -> Optional[SourceParts]:
    """Probe first, then training text, of what is long enough, readable and not there already."""
    probe: List[Part] = []
    train: List[Part] = []
    probe_size = train_size = 0
    more = False
    seen: Set[str] = set()
    for part in candidates:
        if cfg.limit and train_size >= 2 * cfg.limit:
            more = True
            break
        text = "".join(row.text for row in part.rows())
        size = len(text.encode("utf-8"))
        if not _SHORTEST <= size <= cfg.max_document_bytes or _is_copy(text, seen):
            continue
        if len(probe) < _FEWEST_PROBES or probe_size < cfg.probe_bytes:
            probe.append(part)
            probe_size += size
        else:
            train.append(part)
            train_size += size
    if not train:
        return None
    counts = (len(train), probe_size, len(probe), more)
    return SourceParts(tuple(train), tuple(probe), frozenset(), train_size, *counts)


def _is_copy(text: str, seen: Set[str]) -> bool:
    """Whether a text was there before, names of copyright holders aside; licences come a hundred times over."""
    body = " ".join(line for line in text.splitlines() if "copyright" not in line.lower())
    key = f"{keyed_order(' '.join(body.split())):x}"
    if key in seen:
        return True
    seen.add(key)
    return False
