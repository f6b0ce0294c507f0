"""The configuration as a JSON Schema, for editors that complete and check YAML while it is written."""

from __future__ import annotations

import math
import re
import typing
from dataclasses import fields, is_dataclass
from typing import Any, Dict, List

from pipelines.config.documentation import NAME, Key, doc_of_class, every_key
from pipelines.config.keys import bare, hints
from pipelines.config.schema import Config

DRAFT = "https://json-schema.org/draft/2020-12/schema"
REFERENCE = {"type": "string", "pattern": r"\$\{"}
"""An interpolation may stand for any single value."""
NUMBER = r"(-?[0-9.]+)"


def json_schema() -> Dict[str, Any]:
    """A schema of configuration files: unknown keys, types, names that are allowed, and the bounds of numbers.

    What holds between keys is checked by `circadian validate` alone.
    """
    known = {key.name: key for key in every_key()}
    head = {"$schema": DRAFT, "title": "Configuration of a Circadian run"}
    return {**head, **_section(Config, "", known)}


def _section(kind: type, prefix: str, known: Dict[str, Key]) -> Dict[str, Any]:
    properties = {one.name: _key(hints(kind)[one.name], f"{prefix}{one.name}", known) for one in fields(kind)}
    return {
        "type": "object",
        "description": doc_of_class(kind),
        "properties": properties,
        "additionalProperties": False,
    }


def _key(kind: Any, name: str, known: Dict[str, Key]) -> Dict[str, Any]:
    inner, optional = bare(kind)
    key = known[name]
    if is_dataclass(inner) and isinstance(inner, type):
        return {**_section(inner, f"{name}.", known), "description": key.doc}
    if typing.get_origin(inner) is dict:
        value = typing.get_args(inner)[1]
        section = is_dataclass(value) and isinstance(value, type)
        each = _section(value, f"{name}.{NAME}.", known) if section else _value(value, "")
        return {"type": "object", "description": key.doc, "additionalProperties": each}
    found = _value(inner, key.bound)
    if optional:
        found = {"anyOf": [*found.get("anyOf", [found]), {"type": "null"}]}
    if not (isinstance(key.default, float) and math.isinf(key.default)):  # JSON has no word for it
        found["default"] = key.default
    return {**found, "description": key.doc + (f" Must {key.bound}." if key.bound else "")}


def _value(kind: Any, bound: str) -> Dict[str, Any]:
    if typing.get_origin(kind) is list:
        return {"type": "array", "items": _value(typing.get_args(kind)[0], bound)}
    if kind is str:
        names = re.fullmatch(r"be one of (.+)", bound)
        if not names:  # whatever is written is taken as text
            return {"type": ["string", "number", "boolean"]}
        allowed: List[Any] = names[1].split(", ")
        return {"anyOf": [{"enum": allowed + [True, False] * ("true" in allowed)}, REFERENCE]}
    words = {int: "integer", float: "number", bool: "boolean"}
    return {"anyOf": [{"type": words[kind], **_bounds(bound)}, REFERENCE]}


def _bounds(bound: str) -> Dict[str, float]:
    """What a schema can say of a bound; the rest of it is for `validate`."""
    if found := re.match(rf"be at least {NUMBER}", bound):
        return {"minimum": _plain(found[1])}
    if found := re.match(rf"be above {NUMBER}", bound):
        return {"exclusiveMinimum": _plain(found[1])}
    if found := re.match(rf"lie between {NUMBER} and {NUMBER}(, both excluded)?", bound):
        least, most = ("exclusiveMinimum", "exclusiveMaximum") if found[3] else ("minimum", "maximum")
        return {least: _plain(found[1]), most: _plain(found[2])}
    if found := re.match(rf"lie in ([\[(]){NUMBER}, {NUMBER}([\])])", bound):
        least = "minimum" if found[1] == "[" else "exclusiveMinimum"
        most = "maximum" if found[4] == "]" else "exclusiveMaximum"
        return {least: _plain(found[2]), most: _plain(found[3])}
    return {}


def _plain(text: str) -> float:
    return float(text) if "." in text else int(text)
