"""What the configuration says of itself: the strings below fields, defaults, types and bounds, read from the code."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
import typing
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Dict, Iterator, List, Optional, Tuple

from nl_model.checks import listening
from pipelines.config.keys import bare, hints, split_key
from pipelines.config.schema import Config

NAME = "NAME"
"""Stands for a name of the user's own: of a level, of a source."""


@dataclass(frozen=True)
class Key:
    """One key, as people are told of it."""

    name: str
    """Full name; NAME stands for a name of the user's own."""
    kind: Any
    """Its type."""
    doc: str
    """The line below it."""
    default: Any
    """What it is where nobody gives it."""
    bound: str
    """What its value must do ("be at least 1"), empty where every value of the type is fine by itself."""

    @property
    def is_section(self) -> bool:
        """Whether it has keys of its own."""
        return is_dataclass(self.kind) or is_dataclass(_inner(self.kind))


@cache
def docs_of(kind: type) -> Dict[str, str]:
    """The string below each field of a dataclass, as one line, by field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: Dict[str, str] = {}
    for node, after in itertools.pairwise(body.body):
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(text, str):
            found[node.target.id] = " ".join(text.split())
    return found


def doc_of_class(kind: type) -> str:
    """What a section is, in one line."""
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


@cache
def every_key() -> Tuple[Key, ...]:
    """All keys, sections before what is in them, in the order of the code."""
    with listening() as bounds:
        config = Config()
    return tuple(_keys(Config, config, (), bounds))


def find(name: str) -> Optional[Key]:
    """The key of this name; `levels.fast.period` is found as levels.NAME.period."""
    parts = split_key(name)
    for key in every_key():
        pattern = key.name.split(".")
        if len(pattern) == len(parts) and all(p in (NAME, part) for p, part in zip(pattern, parts, strict=True)):
            return key
    return None


def below(name: str) -> List[Key]:
    """The keys right below a section, "" for the sections themselves."""
    prefix = f"{name}." if name else ""
    found = [key for key in every_key() if key.name.startswith(prefix) and key.name != name]
    inner = [key for key in found if not key.name.endswith(f".{NAME}")]
    return [key for key in inner if "." not in key.name[len(prefix) :].removeprefix(f"{NAME}.")]


def type_words(kind: Any) -> str:
    """A type as people say it."""
    inner, optional = bare(kind)
    if optional:
        return f"{type_words(inner)}, or null"
    origin = typing.get_origin(inner)
    if origin is list:
        return f"list of {_PLURALS[typing.get_args(inner)[0]]}"
    if is_dataclass(inner):
        return "section"
    if origin is dict:
        value = typing.get_args(inner)[1]
        return "a section per name" if is_dataclass(value) else f"{type_words(value)} per name"
    return _WORDS[inner]


_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false"}
_PLURALS = {str: "texts", int: "whole numbers", float: "numbers"}


def _keys(kind: Any, value: Any, above: Tuple[str, ...], bounds: Dict[str, str]) -> Iterator[Key]:
    docs = docs_of(kind)
    for one in fields(kind):
        path, hint, default = (*above, one.name), hints(kind)[one.name], getattr(value, one.name)
        inner = _inner(hint)
        doc = docs.get(one.name) or (doc_of_class(inner) if is_dataclass(inner) and isinstance(inner, type) else "")
        yield Key(".".join(path), hint, doc, default, _bound(path, bounds))
        if is_dataclass(inner):
            several = isinstance(default, dict)
            sample = inner() if several and isinstance(inner, type) else default
            if several and isinstance(inner, type):
                yield Key(".".join((*path, NAME)), inner, doc_of_class(inner), sample, "")
            yield from _keys(inner, sample, (*path, NAME) if several else path, bounds)


def _inner(kind: Any) -> Any:
    """The type itself, or that of what a mapping holds."""
    return typing.get_args(kind)[1] if typing.get_origin(kind) is dict else kind


def _bound(path: Tuple[str, ...], bounds: Dict[str, str]) -> str:
    """Value objects of the model do not know where in a configuration they stand, so a key may be named by its end."""
    ends = (".".join(path[n:]) for n in range(len(path)))
    return next((bounds[end] for end in ends if end in bounds), "")
