"""The view in the terminal: a living panel where somebody watches, plain lines where nobody does.

A view can never end the work. What it cannot write is dropped, a panel that cannot be drawn gives way to lines, lines
that cannot be made to silence; each is said once, in the journal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterable
from enum import StrEnum
from types import TracebackType
from typing import Optional, TextIO

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live

from cluster.output import open_console, trouble_of
from cluster.panel import render
from cluster.view_state import ViewState
from pipelines.report.events import Event, to_line
from pipelines.report.lines import Lines


class Mode(StrEnum):
    """How a view shows what happens."""

    PANEL = "panel"
    LINES = "lines"
    JSON = "JSON lines"
    OFF = "off"


class LiveView:
    """Shows a run while it happens. On a terminal a panel that redraws itself, elsewhere one line per event.

    Use as a context manager and give it every event: `with LiveView(name) as view: view.handle(event)`.
    """

    def __init__(self, run_name: str = "", console: Optional[Console] = None, as_json: bool = False) -> None:
        """run_name: shown in the header. console: where to write; standard output if None. as_json: one JSON object per
        event, as in the journal, wherever that is."""
        self.state = ViewState()
        self._run_name = run_name
        self._console = console or open_console()
        self._mode = Mode.JSON if as_json else Mode.LINES
        self._live: Optional[Live] = None
        self._lines = Lines()
        self._panel: RenderableType = ""
        self._failed: Optional[Exception] = None
        """What drawing the panel came to, in the thread that redraws it."""

    def __enter__(self) -> LiveView:
        if self._mode is Mode.LINES and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._mode = Mode.PANEL
            self._panel = self._render()
            self._live = Live(self, console=self._console, refresh_per_second=4, transient=True)
            before = sys.stderr
            self._live.start()
            _move_logging(before, sys.stderr)  # which rich has replaced: what is logged goes above the panel
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the panel off the screen. Closing twice is harmless."""
        live, self._live = self._live, None
        if live is not None:
            above = sys.stderr
            live.stop()
            _move_logging(above, sys.stderr)

    def abandon(self) -> None:
        """Give the terminal its cursor back without waiting for anybody: for a process that is about to end."""
        if self._live is not None:
            with contextlib.suppress(OSError, ValueError):
                os.write(self._console.file.fileno(), b"\x1b[?25h\r\n")

    def restore(self, events: Iterable[Event]) -> None:
        """Take in what happened before (a resumed run's journal) without printing it. What cannot be read of it is
        left out: nothing is recovered from it, and what comes is shown all the same."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            for event in events:
                self.state.update(event)

    def handle(self, event: Event) -> str:
        """Take in one event and show it. Returns what has gone wrong with the view since the last one, once each."""
        if self._mode is Mode.OFF:
            return ""
        try:
            self.state.update(event)
            self._show(event)
        except Exception as error:  # noqa: BLE001 (whatever rich or a broken event raises: the caller journals it)
            return self._give_way(error)
        if trouble := trouble_of(self._console):
            self._mode = Mode.OFF
            return f"nothing can be shown any more ({trouble}); the run goes on without it"
        return ""

    def _show(self, event: Event) -> None:
        if self._mode is Mode.PANEL:
            if self._failed is not None:
                raise self._failed
            self._panel = self._render()
            return
        if text := to_line(event) if self._mode is Mode.JSON else self._lines.line(event):
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        """The panel as it is now; kept, because the thread that redraws must not walk through a state that changes."""
        return render(self.state, self._run_name, *self._console.size)

    def _give_way(self, error: Exception) -> str:
        """Show less: lines instead of a panel, nothing instead of lines."""
        failed, self._mode = self._mode, Mode.LINES if self._mode is Mode.PANEL else Mode.OFF
        self._failed = None
        self.close()
        return f"the {failed.value} cannot be shown any more ({type(error).__name__}: {error}); the run goes on"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The panel, as the thread that redraws asks for it: an error must neither end that thread nor be lost."""
        try:
            drawn = list(console.render(self._panel, options))
        except Exception as error:  # noqa: BLE001 (whatever rich raises; handle() says it)
            self._failed, drawn = error, []
        yield from drawn


def _move_logging(old: TextIO, new: TextIO) -> None:
    """Have the root's handlers that write to one stream write to another."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is old:
            handler.setStream(new)
