"""YAML as its readers expect it: the plain words of YAML 1.2, no key twice, UTF-8, errors of one line.

PyYAML follows YAML 1.1, where `0123` is 83, `1:30` is 90, `no` is false and `1e-3` is text, and of two equal keys the
first is lost without a word. Here a file becomes a tree of nodes, which still know what was written and on which line;
what a node means is decided where its key is known (pipelines/config/values.py).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Dict, Set, Tuple

import yaml

MISSING = "???"
"""What stands for a value that must be given before a file can be used."""
TAG = "tag:yaml.org,2002:"
NULL = f"{TAG}null"
MERGE = f"{TAG}merge"
KNOWN_TAGS = frozenset(TAG + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge"))
INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", re.ASCII
)
BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")


class CoreLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the core schema of YAML 1.2 for plain words (and `<<`, which people know from 1.1)."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.source = name
        self.settled: Set[int] = set()

    def check_key(self) -> bool:
        """Whether a key in the long form begins here; PyYAML would take any question mark between brackets for one."""
        return not self._at_missing() and super().check_key()

    def fetch_plain(self) -> None:
        """A plain word; between brackets PyYAML ends it at a question mark, which would hide what is missing."""
        if not self._at_missing():
            return super().fetch_plain()
        self.save_possible_simple_key()
        self.allow_simple_key = False
        start = self.get_mark()
        self.forward(len(MISSING))
        self.tokens.append(yaml.ScalarToken(MISSING, True, start, self.get_mark()))

    def check_plain(self) -> bool:
        """Whether a plain word begins here."""
        return self._at_missing() or super().check_plain()

    def _at_missing(self) -> bool:
        return bool(self.flow_level) and self.prefix(len(MISSING)) == MISSING

    def settle(self, node: yaml.Node, path: Tuple[str, ...] = (), above: Tuple[yaml.Node, ...] = ()) -> None:
        """Put in what `<<` takes over. ValueError for a key that stands twice, a tag, and a node that holds itself."""
        if node in above:
            raise ValueError(f"{self._place(node)}: {'.'.join(path)} holds itself; write it out")
        if id(node) in self.settled:
            return
        self.settled.add(id(node))
        if node.tag not in KNOWN_TAGS:
            raise ValueError(f"{self._place(node)}: the tag {node.tag!r} means nothing here; leave it out")
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self.settle(item, path, (*above, node))
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node, path)
            for key, value in node.value:
                self.settle(value, (*path, key_text(key)), (*above, node))
            self.flatten_mapping(node)

    def _check_keys(self, node: yaml.MappingNode, path: Tuple[str, ...]) -> None:
        lines: Dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"{self._place(key)}: a key must be a plain name, not a list or a mapping")
            text, line = key_text(key), line_of(key)
            if text in lines and key.tag != MERGE:
                full = ".".join((*path, text))
                raise ValueError(
                    f"{self.source}: key {full!r} stands twice, on line {lines[text]} and on line {line}; keep one of "
                    "the two, with everything that belongs there"
                )
            lines[text] = line

    def _place(self, node: yaml.Node) -> str:
        return f"{self.source}, line {line_of(node)}"


CoreLoader.yaml_implicit_resolvers = {}  # those of YAML 1.1
for _kind, _pattern, _first in (
    ("bool", BOOL.pattern, [*"tTfF"]),
    ("int", INT.pattern, [*"-+0123456789"]),
    ("float", FLOAT.pattern, [*"-+.0123456789"]),
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("merge", r"<<", ["<"]),
):
    CoreLoader.add_implicit_resolver(TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), _first)


def read_text(path: Path) -> str:
    """A file's text. ValueError names the file and the offset of the first byte that is not UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}; save it as UTF-8"
        ) from None


def compose(text: str, name: str) -> yaml.MappingNode:
    """The tree of a document that must hold a mapping (nothing at all counts as an empty one).

    Raises:
        ValueError: with `name` and the line; no YAML, a key twice, or no mapping.
    """
    node = compose_any(text, name)
    if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == NULL):
        return yaml.MappingNode(f"{TAG}map", [])
    if not isinstance(node, yaml.MappingNode):
        kind = "list" if isinstance(node, yaml.SequenceNode) else "single value"
        raise ValueError(f"{name} must hold a mapping of sections, not a {kind}")
    return node


def compose_any(text: str, name: str) -> Any:
    """The tree of a document of any kind, None for an empty one; errors as those of `compose`."""
    try:
        loader = CoreLoader(text, name)
        try:
            node = loader.get_single_node()
            if node is not None:
                loader.settle(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not valid YAML: {_one_line(error)}") from None
    except RecursionError:
        raise ValueError(f"{name} is not valid YAML: it is nested too deeply") from None
    return node


def line_of(node: yaml.Node) -> int:
    """The line that a node begins on, counted from 1."""
    return 1 if node.start_mark is None else int(node.start_mark.line) + 1


def key_text(node: yaml.Node) -> str:
    """A key as it was written: names of sources and levels are text, whatever they look like."""
    return str(node.value)


def _one_line(error: yaml.YAMLError) -> str:
    """What PyYAML says over several lines, with the place first."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        return place + (error.problem or error.context or "it cannot be read").replace("\n", " ")
    return " ".join(str(error).split())
