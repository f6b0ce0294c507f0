"""Where commands write: a console on standard output that cannot end the work behind it."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import IO, Optional, TextIO, cast

from rich.console import Console

PLAIN = str.maketrans(
    {
        "\N{EN DASH}": "-",
        "\N{MINUS SIGN}": "-",
        "\N{HORIZONTAL ELLIPSIS}": "~",
        "\N{BULLET}": "*",
    }
)
"""What our own texts hold beyond ASCII, for consoles that know no more."""


class Outlet(io.TextIOBase):
    """A stream that is written to as long as it takes anything; from then on text is dropped, and `trouble` says why.

    A pipe that nobody reads any more (`| head`), a full disk, a terminal that is gone: none of them is the work's
    business. Characters that the stream's encoding lacks are replaced.
    """

    def __init__(self, stream: Optional[TextIO]) -> None:
        """stream: where to write; None where a process was started without one."""
        self._stream = stream
        self.trouble = "" if stream is not None else "there is no standard output"
        """Why nothing is written any more; empty as long as it is."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream: rich draws its boxes with what it holds."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether somebody watches."""
        return not self.trouble and self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        """The stream's descriptor; OSError where it has none."""
        if self._stream is None:
            raise OSError("no stream, no descriptor")
        return self._stream.fileno()

    def writable(self) -> bool:
        """Always: what cannot be written is dropped."""
        return True

    def write(self, text: str) -> int:
        """Write, or drop; the length of the text."""
        if self._stream is not None and not self.trouble:
            try:
                self._stream.write(encodable(text, self.encoding))
            except (OSError, ValueError) as error:  # ValueError: the stream was closed
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Write out what is buffered."""
        if self._stream is not None and not self.trouble:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.trouble = getattr(error, "strerror", None) or str(error) or type(error).__name__
        # What Python still holds in its buffer would fail once more at the exit, and make the status 120.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)


def encodable(text: str, encoding: str) -> str:
    """The text in characters that an encoding has; others become similar ones, or a question mark."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(PLAIN).encode(encoding, "replace").decode(encoding)
    except LookupError:
        return text.encode("ascii", "replace").decode()
    return text


def open_console() -> Console:
    """A console on standard output, through an outlet."""
    return Console(file=cast(IO[str], Outlet(sys.stdout)))


def trouble_of(console: Console) -> str:
    """Why a console's output goes nowhere; empty where it is fine."""
    return console.file.trouble if isinstance(console.file, Outlet) else ""
