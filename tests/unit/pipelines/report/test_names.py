"""Names of sources in the report: shown as they are, whatever signs they are made of."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.data.printable import printable
from pipelines.report.events import Timeline
from pipelines.report.page import render_summary_table
from pipelines.report.plots import matrix, online_loss


@pytest.mark.parametrize("name", ["[/x]", "a$\\b$", "_hidden", "$", "\x1b[31m", "one\ntwo", "back\\", "\u202eturned"])
def test_any_name_of_a_source_can_be_shown_and_drawn(tmp_path: Path, name: str) -> None:
    """Not as markup, as a formula, or as control of the terminal."""
    rows = [{"release": 0, "tokens": 0, "label": "base"}, {"release": 1, "tokens": 8, "label": f"after {name}"}]
    figures = {"matrix": [[2.0, 3.0], [1.0, 2.5]], "rows": rows, "mean_final_bpb": 1.75}
    summary = {**figures, "sources": [name, "plain"], "control": None, "controls": {}}
    console = Console(file=io.StringIO(), width=160)
    console.print(render_summary_table(summary))
    assert isinstance(console.file, io.StringIO)
    assert [line for line in console.file.getvalue().splitlines() if line.startswith(f"│ {printable(name)} ")]
    timeline = Timeline(sources=["plain", name], bpb={"plain": [(1, 3.0)], name: [(1, 2.0), (2, 2.5)]})
    for number, figure in enumerate((matrix(summary), online_loss(timeline))):
        figure.savefig(tmp_path / f"{number}.png", dpi=30)
