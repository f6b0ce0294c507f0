"""What a run reads of its data, for the terminal: a table of sources, then what was decided and what is left out."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.data.facts import DataFacts, SourceFacts
from pipelines.data.printable import printable

LINES = 12
"""Most lines about what is left out; of the rest it is said how many there are."""


def show_data(console: Console, facts: DataFacts) -> None:
    """Print the facts about a run's data. Names come from data: none is markup, or controls the terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("source", overflow="fold")
    for heading in ("documents", "bytes", "held out", "base", "stream"):
        table.add_column(heading, justify="right")
    table.add_column("why not all", overflow="fold")
    for source in facts.sources:
        table.add_row(*map(Text, _cells(source)))
    console.print(table)
    more = len(facts.left_out) - LINES
    for line in [*facts.notes, *facts.left_out[:LINES], *([f"and {more:,} more such lines"] if more > 0 else [])]:
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def _cells(source: SourceFacts) -> list[str]:
    plus = "+" if source.more else ""
    counts = [f"{source.documents:,}{plus}", f"{source.size:,}{plus}", f"{source.held_size:,}"]
    reads = [f"{size:,}" if size else "-" for size in (source.base, source.stream)]
    return [printable(source.name), *counts, *reads, source.why]
