"""What was written into values of the types that keys have; text stays as it was written."""

from __future__ import annotations

import re
import typing
from dataclasses import is_dataclass
from typing import Any, Callable, Dict, Mapping, Optional, Sequence

import yaml

from pipelines.config.keys import bare, hints, kind_at, split_key
from pipelines.config.yaml_reader import BOOL, FLOAT, INT, MISSING, NULL, compose_any, key_text, line_of

COMMAND_LINE = "the command line"
OPENING = re.compile(r"(\\*)\$\{")
REFERENCE = re.compile(r"\$\{ *\.*[A-Za-z_]\w*(\.\w+|\[\w+\])* *\}", re.ASCII)
"""An interpolation that names a key and nothing else."""
GROUPED = re.compile(r"[-+]?[0-9]{1,3}(_[0-9]{3})+")
SPELT_OUT = re.compile(r"[-+]?(\.?inf|infinity|\.?nan)", re.IGNORECASE)
LONGEST_NUMBER = 40
LARGEST = (1 << 63) - 1
EXPECTED = {
    bool: ("neither true nor false", "true"),
    int: ("no whole number", "16"),
    float: ("no number", "0.001"),
    str: ("no single text", "name"),
}
"""By type: what a value is not, and an example."""
MOST_SHOWN = 80


def read_tree(node: yaml.Node, kind: Any, key: str, name: str) -> Any:
    """What a node of a file means where its key has the type `kind`.

    Args:
        kind: None where there is no such key: what comes back is only good to say so.
        key: full name of the key, "" for the whole file.
        name: the file.

    Raises:
        ValueError: with file, line, key and value; it cannot be read as that type, or is still to be given.
    """
    kind, optional = bare(kind)
    where = f"{name}, line {line_of(node)}" if name != COMMAND_LINE else name
    if isinstance(node, yaml.ScalarNode):
        null = node.tag == NULL
        if null and (optional or _is_section(kind)):
            return None
        if name != COMMAND_LINE:
            _check_references(node.value, key, where)
        return read_scalar(node.value, kind, key, where, null)
    if typing.get_origin(kind) is list:
        if not isinstance(node, yaml.SequenceNode):
            raise ValueError(_wrong(_shape(node), kind, key, where))
        item = typing.get_args(kind)[0]
        return [read_tree(part, item, f"{key}[{n}]", name) for n, part in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode) and kind in EXPECTED:
        raise ValueError(f"{where}: {key} is a single value, it has no keys of its own")
    if isinstance(node, yaml.MappingNode) and kind is not None:
        found = {key_text(part): value for part, value in node.value}
        kinds = {part: _kind_of(kind, part) for part in found}
        return {part: read_tree(found[part], kinds[part], f"{key}.{part}".lstrip("."), name) for part in found}
    if kind in EXPECTED:
        raise ValueError(_wrong(_shape(node), kind, key, where))
    if kind is not None:
        raise ValueError(f"{where}: {key}={_shape(node)} must be a section with keys of its own")
    return _shape(node)


def read_scalar(text: str, kind: Any, key: str, where: str, null: bool = False) -> Any:
    """What a single value means where its key has the type `kind`; what holds `${` is left to interpolation.

    Args:
        null: the value is an empty one, not text.
    """
    if text == MISSING:
        raise ValueError(f"{where}: {key} must be given; {MISSING} stands for a value that is missing")
    if kind is str and not null:
        return text
    if kind is None or (kind in EXPECTED and "${" in text):
        return text
    if _is_section(kind):
        raise ValueError(f"{where}: {key}={text} must be a section with keys of its own")
    found = None if null else _READ[kind](text.strip()) if kind in _READ else None
    if found is None:
        raise ValueError(_wrong(text, kind, key, where))
    return found


def read_overrides(items: Sequence[str]) -> Dict[str, Any]:
    """Overrides `key=value` as a tree of values; later ones win.

    Where a key holds text the value is that text, letter by letter: `run.name=001`, `stream.path={a,b}.txt`. Only
    `null`, or nothing at all, means none where there may be none, and `${...}` is an interpolation, of the environment
    too (`${oc.env:HOME}`): who types it means it. Lists and sections are YAML, `[a,b]` and `{a: 1}`; what is text in
    them is taken as it is written there.

    Raises:
        ValueError: no override, or a value that its key cannot have.
    """
    tree: Dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not key or not equals:
            raise ValueError(f"override {item!r} is not of the form key=value, for instance run.name=first")
        parts = split_key(key)
        value: Any = _read_override(key, text, kind_at(parts))
        for part in reversed(parts):
            value = {part: value}
        tree = _laid_over(tree, value)
    return tree


def _read_override(key: str, text: str, given: Any) -> Any:
    kind, optional = bare(given)
    if optional and text in ("null", ""):
        return None
    if kind is None or kind in EXPECTED:
        return read_scalar(text, kind, key, COMMAND_LINE)
    try:
        node = compose_any(text, key)
    except ValueError as error:
        raise ValueError(f"{_wrong(text, kind, key, COMMAND_LINE)} ({error})") from None
    if node is None or node.end_mark.index < len(text.rstrip()):
        raise ValueError(_wrong(text, kind, key, COMMAND_LINE))
    return read_tree(node, kind, key, COMMAND_LINE)


def _check_references(text: str, key: str, where: str) -> None:
    """A file may refer to other keys. What else OmegaConf would work out (`${oc.env:...}`) reads the environment of
    whoever uses the file, and ends up in logs and trackers: that is for the command line, where who types it sees it.
    """
    for match in OPENING.finditer(text):
        if len(match[1]) % 2 == 0 and not REFERENCE.match(text, match.end(1)):
            raise ValueError(
                f"{where}: {key}={_shown(text)} holds an interpolation that is no ${{section.key}}; a file may hold "
                f"no other: give it on the command line, '{key}={text[:MOST_SHOWN]}', or write \\${{ for that text"
            )


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) <= MOST_SHOWN else f"{repr(value)[:MOST_SHOWN]}..."


def _laid_over(under: Mapping[str, Any], over: Mapping[str, Any]) -> Dict[str, Any]:
    found = dict(under)
    for key, value in over.items():
        below = found.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        found[key] = _laid_over(below, value) if both else value  # type: ignore[arg-type]
    return found


def _true_or_false(text: str) -> Optional[bool]:
    return text.lower() == "true" if BOOL.fullmatch(text) else None


def _whole(text: str) -> Optional[int]:
    if len(text) > LONGEST_NUMBER or not (INT.fullmatch(text) or GROUPED.fullmatch(text)):
        return None
    found = int(text, 0) if text[:2] in ("0x", "0o") else int(text)
    return found if abs(found) <= LARGEST else None


def _number(text: str) -> Optional[float]:
    whole = _whole(text)
    if whole is not None:
        return float(whole)
    if SPELT_OUT.fullmatch(text):
        return float(text.replace(".", ""))
    return float(text) if FLOAT.fullmatch(text) else None


_READ: Dict[Any, Callable[[str], Any]] = {bool: _true_or_false, int: _whole, float: _number}


def _is_section(kind: Any) -> bool:
    return kind is not None and kind not in EXPECTED and typing.get_origin(kind) is not list


def _kind_of(kind: Any, part: str) -> Any:
    """The type of a key of a section."""
    if typing.get_origin(kind) is dict:
        return typing.get_args(kind)[1]
    return hints(kind).get(part) if is_dataclass(kind) and isinstance(kind, type) else None


def _shape(node: yaml.Node) -> Any:
    """Enough of a node to say that it has no business there."""
    if isinstance(node, yaml.MappingNode):
        return {key_text(key): "..." for key, _ in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [item.value if isinstance(item, yaml.ScalarNode) else "..." for item in node.value]
    return node.value


def _wrong(value: Any, kind: Any, key: str, where: str) -> str:
    shown = _shown(value)
    if typing.get_origin(kind) is list:
        what, example = "no list", f"[{EXPECTED[typing.get_args(kind)[0]][1]}]"
    elif kind in EXPECTED:
        what, example = EXPECTED[kind]
    else:
        what, example = "no section", "{KEY: VALUE}"
    if kind is bool and str(value).lower() in ("no", "off", "0"):
        example = "false"
    whole = key.partition("[")[0] if key.endswith("]") else key
    example = f"[{example}]" if whole != key else example
    return f"{where}: {key}: {shown} is {what}; give one, for instance {whole}={example}"
