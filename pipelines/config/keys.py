"""What keys there are, and of which type each is: read from the dataclasses, nowhere written down again."""

from __future__ import annotations

import re
import types
import typing
from dataclasses import is_dataclass
from functools import cache
from typing import Any, Dict, List, Sequence, Tuple

from pipelines.config.schema import Config

PART = re.compile(r"\[([^\[\]]+)\]|([^.\[\]]+)")
KEY = re.compile(rf"(?:{PART.pattern})(?:\.[^.\[\]]+|\.?\[[^\[\]]+\])*")


@cache
def hints(kind: type) -> Dict[str, Any]:
    """Types of the fields of a dataclass, by name."""
    found = typing.get_type_hints(kind)
    return {name: found[name] for name in kind.__dataclass_fields__}  # type: ignore[attr-defined]


def bare(kind: Any) -> Tuple[Any, bool]:
    """A type without its Optional, and whether it had one."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(kind) if part is not type(None)]
        assert len(inner) == 1, f"{kind} is no type of a configuration key"
        return inner[0], True
    return kind, False


def kind_at(parts: Sequence[str]) -> Any:
    """The type of a key, by the parts of its name; None where there is no such key."""
    kind: Any = Config
    for part in parts:
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        elif is_dataclass(kind) and isinstance(kind, type):
            kind = hints(kind).get(part)
        else:
            return None
    return kind


def split_key(key: str) -> List[str]:
    """The parts of a dotted key. A part in brackets may hold dots: `gate.budgets[notes.txt]`. ValueError for no key."""
    if not KEY.fullmatch(key):
        raise ValueError(f"key {key!r} is not of the form section.key, or section[name].key where a name holds dots")
    return [match[1] or match[2] for match in PART.finditer(key)]
