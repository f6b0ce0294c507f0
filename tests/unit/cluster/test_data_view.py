"""What the terminal gets to see of a run's data: names as they are, never as markup or as control of the terminal."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cluster.cli import main, store_ls
from cluster.data_view import LINES, show_data
from pipelines.config.load import load_config
from pipelines.data.facts import DataFacts, data_facts
from pipelines.data.module import open_data
from pipelines.data.printable import printable
from pipelines.experience import ExperienceStore, Record

TEXT = "".join(f"Line {i} of a text about rivers, lamps and stones, number {i * i}.\n\n" for i in range(400))


def seen(facts: DataFacts, width: int = 200, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    show_data(console, facts)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def facts_of(folder: Path) -> DataFacts:
    return data_facts(
        open_data(load_config("smoke", [f"stream.path={folder}", "stream.sources=[]", "base.sources=[]"]))
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("aa", "bb"):
        (tmp_path / f"{name}.txt").write_text(TEXT)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("[/x]", "[/x]"),
        ("[wiki]", "[wiki]"),
        ("[bold red]loud[/]", "[bold red]loud[/]"),
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("one\ntwo", r"one\ntwo"),
        ("news\u202etxt", r"news\u202etxt"),
    ],
)
def test_names_of_sources_are_shown_as_they_are(folder: Path, name: str, shown: str) -> None:
    rows = (json.dumps({"text": f"A document about lamps, number {i}. " * 12, "source": name}) for i in range(200))
    (folder / "a.jsonl").write_text("\n".join(rows))
    output = seen(facts_of(folder))
    assert [line for line in output.splitlines() if line.startswith(shown)], output
    assert all(sign.isprintable() for sign in output.replace("\n", ""))


@pytest.mark.parametrize("name", ["[/x]", "[wiki]", "back\\", "\x1b[2Jgone", "one\ntwo", "news\u202etxt"])
def test_the_list_of_a_store_shows_names_as_they_are(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Record(
        key=0, source=name, document=0, offset=0, subject=None, kind="real", surprise=1.0, fast_step=0, release=0,
        tokens=np.zeros(17, np.uint16),
    )  # fmt: skip
    with ExperienceStore.open(tmp_path / "store", 16, "uint16") as store:
        store.append([row])
        store.commit()
    monkeypatch.setenv("COLUMNS", "200")
    store_ls(tmp_path / "store")
    output = capsys.readouterr().out
    assert f" {printable(name)} 1 " in output and all(sign.isprintable() for sign in output.replace("\n", ""))


def test_errors_show_names_as_they_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "two\x1b[2J.txt").write_text(TEXT)
    words = ["circadian", "validate", "smoke", f"stream.path={folder}", "stream.sources=[nosuch]", "base.sources=[]"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and r"aa, bb, two\x1b[2J" in said and "\x1b" not in said


def test_names_of_files_are_shown_as_they_are(folder: Path) -> None:
    (folder / "[x]\x1b[31m.gz").write_text("x")
    assert r"not read: .gz, 1 ([x]\x1b[31m.gz): compressed" in seen(facts_of(folder))


def test_every_number_is_there_and_fits_a_narrow_terminal(folder: Path) -> None:
    output = seen(facts_of(folder), width=80)
    (line,) = [line for line in output.splitlines() if line.startswith("bb ")]
    assert line.split()[1:] == ["16", "26,227", "3,300", "-", "12,288", "stream", "limit"]
    assert "stream limit: stream.max_source_bytes=12288 bytes of each source; 0 reads all" in output


def test_a_thousand_kinds_take_a_dozen_lines(folder: Path) -> None:
    facts = replace(facts_of(folder), left_out=tuple(f"not read: .{i}" for i in range(1000)))
    output = seen(facts)
    assert output.count("not read") == LINES and f"and {1000 - LINES} more such lines" in output
