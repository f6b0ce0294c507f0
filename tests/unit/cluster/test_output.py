"""A view that fails is dropped, and the work goes on: closed pipes, full disks, narrow encodings, broken renderers."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, List, cast

import pytest
from rich.console import Console

import cluster.live
from cluster.live import LiveView
from cluster.output import Outlet, encodable, trouble_of
from pipelines.report.events import Event
from tests.harness import ROOT, environment


def adopted(number: int) -> Event:
    return {"t": float(number), "event": "adopted", "release": number, "tokens": 64 * number}


def console_on(stream: io.TextIOWrapper, **settings: object) -> Console:
    return Console(file=cast(IO[str], Outlet(stream)), **settings)  # type: ignore[arg-type]


def test_a_closed_pipe_is_said_once_and_then_nothing_is() -> None:
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        console = console_on(stream)
        with LiveView("night", console) as view:
            assert view.handle(adopted(1)) == ""
            os.close(reader)
            told = [view.handle(adopted(number)) for number in (2, 3, 4)]
        console.print("the table that comes last")
        assert told == ["nothing can be shown any more (Broken pipe); the run goes on without it", "", ""]
        assert trouble_of(console) == "Broken pipe"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_no_error_of_the_run() -> None:
    with open("/dev/full", "w") as stream, LiveView("night", console_on(stream)) as view:
        assert "No space left" in view.handle(adopted(1))


def test_the_exit_status_is_that_of_the_work() -> None:
    program = (
        "from cluster.output import open_console\n"
        "console = open_console()\n"
        "for _ in range(9999): console.print('line')\n"
        "import sys; sys.exit(7)"
    )
    command = f'{sys.executable} -c "{program}" | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command], env=environment(), cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines() == ["line", "7"] and done.stderr == ""


def test_no_standard_output_at_all() -> None:
    outlet = Outlet(None)
    assert outlet.write("text") == 4 and not outlet.isatty() and outlet.trouble


def test_what_a_console_cannot_encode_is_replaced() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    console = console_on(stream, width=40)
    console.print("Lärm \N{MINUS SIGN}1 \N{EN DASH} \N{SNOWMAN}")
    assert raw.getvalue() == b"L?rm -1 - ?\n"
    assert encodable("ä", "latin-1") == "ä" and encodable("ä", "no such encoding") == "?"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_the_panel_fits_the_encoding(encoding: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    with LiveView("nächtens", console_on(stream, width=80, height=24, force_terminal=True, _environ={})) as view:
        assert view.handle(adopted(1)) == ""
    text = raw.getvalue().decode(encoding)
    assert ("nächtens" in text) == (encoding == "utf-8") and "adopted release 1" in text


@pytest.mark.parametrize("environ", [{"TERM": "dumb"}, {"TERM": "xterm", "NO_COLOR": "1"}])
def test_plain_terminals(environ: dict[str, str]) -> None:
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, _environ=environ)
    with LiveView("night", console) as view:
        assert view.handle(adopted(1)) == ""
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    if environ["TERM"] == "dumb":
        assert shown.endswith("adopted release 1 at 64 tokens\n") and "\x1b" not in shown
    else:
        assert "adopted release 1" in shown and "\x1b[3" not in shown.replace("\x1b[2K", "")


class Broken:
    """What raises while it is drawn, as a mistake of ours would."""

    def __rich__(self) -> str:
        raise ZeroDivisionError("nothing to divide by")


@pytest.mark.parametrize("when", ["while it is built", "while it is drawn"])
def test_a_panel_that_fails_gives_way_to_lines(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, _environ={})
    told: List[str] = []
    with LiveView("night", console) as view:

        def render(*_: object) -> Broken:
            if when == "while it is built":
                raise ZeroDivisionError("nothing to divide by")
            return Broken()

        monkeypatch.setattr(cluster.live, "render", render)
        told.append(view.handle(adopted(1)))
        if view._live is not None:
            view._live.refresh()
        told += [view.handle(adopted(number)) for number in (2, 3)]
    said = [text for text in told if text]
    assert said == ["the panel cannot be shown any more (ZeroDivisionError: nothing to divide by); the run goes on"]
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().endswith("adopted release 3 at 192 tokens\n")


def test_lines_that_fail_give_way_to_silence() -> None:
    with LiveView("night", Console(file=io.StringIO())) as view:
        told = [view.handle({"t": 1.0, "event": "base_finished"}), view.handle(adopted(2))]
    assert told[0].startswith("the lines cannot be shown any more (KeyError") and told[1] == ""
