"""Text that comes from data, made fit for a terminal: it is never markup, and never controls anything."""

from __future__ import annotations

from typing import Any

_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: object, keep: str = "") -> str:
    """A text with everything that is not printed as a sign of its own escaped.

    That is control characters (colours, cursor movements, new lines), what turns the direction of writing or is
    invisible, and what no encoding can write (half a surrogate pair, from file names that are not UTF-8).

    Args:
        keep: characters that stay as they are, for instance new lines of a message.
    """
    return "".join(sign if sign.isprintable() or sign in keep else _escape(sign) for sign in str(text))


def printable_values(value: Any) -> Any:
    """A JSON-able value with every text in it made printable, keys too."""
    if isinstance(value, dict):
        return {printable(key): printable_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable_values(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def _escape(sign: str) -> str:
    code = ord(sign)
    if sign in _ESCAPES:
        return _ESCAPES[sign]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
