"""The configuration told to people: one key, or a page of all of them, made from what the code says of itself."""

from __future__ import annotations

import math
import typing
from dataclasses import asdict
from typing import Any, Dict, Iterator, List, Mapping, Tuple

from nl_model.config import LevelConfig
from pipelines.config.documentation import NAME, Key, below, every_key, find, type_words
from pipelines.config.keys import split_key
from pipelines.config.load import check_key, flatten, shipped_files
from pipelines.config.schema import Config

HEAD = """# Configuration

Every key, as `circadian config reference` writes it from `pipelines/config` and `nl_model/config.py`; do not edit this
page. `circadian config explain KEY` says the same of one key, `circadian config schema` is for editors that check YAML.

What is written is read as its key wants it: text stays as it stands, `true` and `false` alone are true and false,
numbers are those of YAML 1.2. `null` means none where a type allows it, `???` is a value that must still be given, and
`${section.key}` the value of another key (on the command line also `${oc.env:NAME}`). `~` at the start of a path is a
home folder. NAME stands for a name of your own; `.inf` is endless where its key says so.
"""
COLUMNS = ["| key | type | default | must | meaning |", "| --- | --- | --- | --- | --- |"]


def explain(name: str) -> str:
    """What there is to know of a key, or of a section and its keys.

    Raises:
        ValueError: there is no such key; the message leads to the nearest, or to what stands here for a usual name.
    """
    parts = split_key(name)
    above = find(".".join(parts[:-1])) if len(parts) > 1 else None
    key = find(name) or (above if above is not None and typing.get_origin(above.kind) is dict else None)
    if key is None:
        check_key(name, "config explain")
    assert key is not None
    lines = [f"{name}: {type_words(key.kind)}", *_wrapped(key.doc)]
    if key.is_section:
        keys = below(key.name)
        width = max(len(one.name) for one in keys)
        return "\n".join([*lines, "", *(f"  {one.name:{width}}  {_short(one)}" for one in keys)])
    lines += [f"  default  {shown(_default_of(key, parts))}"] + [f"  bound    must {key.bound}"] * bool(key.bound)
    return "\n".join([*lines, *(f"  set by   {where}: {shown(value)}" for where, value in setters(name))])


def _default_of(key: Key, parts: List[str]) -> Any:
    """Its default; of a level that is there by default, that level's."""
    value: Any = Config()
    for part in parts:
        value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
        if value is None:
            return key.default
    return value


def setters(name: str) -> List[Tuple[str, Any]]:
    """Shipped files that set a key, and to what; of every level where the key is written with NAME."""
    wanted, found = split_key(name), []
    for where, tree in shipped_files():
        for key, value in flatten(tree).items():
            parts = key.split(".")
            if len(parts) == len(wanted) and all(w in (NAME, p) for w, p in zip(wanted, parts, strict=True)):
                found.append((where if NAME not in wanted else f"{where}, {key}", value))
    return found


def page() -> str:
    """docs/reference/configuration.md."""
    parts = [HEAD]
    tables: Dict[str, List[Key]] = {}
    for key in every_key():
        if not key.is_section:
            tables.setdefault(key.name.rpartition(".")[0], []).append(key)
    for section, keys in tables.items():
        found = find(section) if section else None
        head = f"## {section}\n\n{_cell(found.doc)}\n" if found else "## At the top\n"
        rows = [f"| `{key.name.rpartition('.')[2]}` | {' | '.join(_cells(key))} |" for key in keys]
        parts.append("\n".join([head, *COLUMNS, *rows]))
    parts.append("## What shipped files set\n\n" + "\n".join(f"* {line}" for line in _files()))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def shown(value: Any) -> str:
    """A value as it would be written."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(shown(one) for one in value)}]"
    return str(value)


def _cells(key: Key) -> Iterator[str]:
    yield type_words(key.kind)
    yield f"`{shown(key.default)}`"
    yield _cell(key.bound)
    yield _cell(key.doc)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _files() -> Iterator[str]:
    plain = flatten(asdict(LevelConfig()))
    for name, level in Config().levels.items():
        changed = {key: value for key, value in flatten(asdict(level)).items() if value != plain[key]}
        yield f"level {name}, there by default: {_given(changed)}"
    for where, tree in shipped_files():
        yield f"{where}: {_given(flatten(tree)) or 'nothing, it is the defaults'}"


def _given(flat: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}={shown(value)}`" for key, value in flat.items())


def _short(key: Key) -> str:
    first = key.doc.split(". ")[0].rstrip(".")
    what = "section" if key.is_section else f"{type_words(key.kind)}, {shown(key.default)}"
    return f"({what}) {first}"


def _wrapped(text: str) -> List[str]:
    return [f"  {text}"] if text else []
