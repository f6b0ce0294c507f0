"""The panel that somebody sees who watches a run in a terminal."""

from __future__ import annotations

from typing import Optional

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.view_state import ViewState
from pipelines.report.events import describe_round, short_number

LIT_SECONDS = 2.0  # how long a written level stays lit
ROUNDS = 8
DECISIONS = {"promoted": "green", "rejected": "red"}


def render(state: ViewState, run_name: str) -> RenderableType:
    """The panel of a state."""
    header = Text.assemble((run_name or "circadian", "bold"), "  ", (state.phase, "cyan"), f"  release {state.release}")
    total = max(1, state.stream_tokens, state.tokens)
    bar = Table.grid(padding=(0, 2))
    speed = f"{short_number(state.tokens_per_second)} tok/s"
    bar.add_row(ProgressBar(total=total, completed=state.tokens, width=40), f"{state.tokens:,} of {total:,}", speed)
    parts: list[RenderableType] = [bar, Text(), _render_levels(state), Text(), _render_sources(state)]
    if state.rounds:
        parts += [Text(), _render_rounds(state)]
    if state.messages:
        parts += [
            Text(),
            *(Text(message, style="dim", overflow="ellipsis", no_wrap=True) for message in state.messages),
        ]
    return Panel(Group(*parts), title=header, title_align="left", padding=(1, 2))


def _render_levels(state: ViewState) -> Text:
    text = Text()
    for name in sorted(state.levels, key=lambda name: state.levels[name].period):
        level = state.levels[name]
        style = "bold black on bright_yellow" if state.now - level.last < LIT_SECONDS else "dim"
        text.append(f" {name} ", style=style)
        text.append(f" {level.writes:,} writes    ")
    return text


def _render_sources(state: ViewState) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("source")
    columns = {"online bpb": state.online, "last probe": state.probe, "final": state.final}
    if state.recalled:
        columns = {"online bpb": state.online, "with recall": state.recalled, **columns}
    for column in columns:
        table.add_column(column, justify="right")
    for source in state.sources:
        cells = [_score(scores.get(source)) for scores in columns.values()]
        table.add_row(Text(source), *cells, style="bold" if source in state.current else "")
    return table


def _render_rounds(state: ViewState) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("round", "state", "progress", "gate"):
        table.add_column(column)
    for number in sorted(state.rounds)[-ROUNDS:]:
        view = state.rounds[number]
        progress: RenderableType = Text()
        if view.steps:
            loss = "" if view.loss is None else f"  loss {view.loss:.3f}"
            progress = Table.grid(padding=(0, 1))
            progress.add_row(
                ProgressBar(total=view.steps, completed=view.step, width=16), f"{view.step}/{view.steps}{loss}"
            )
        gate = describe_round(view.state, view.figures).partition(": ")[2] if view.state in DECISIONS else ""
        table.add_row(str(number), Text(view.state, style=DECISIONS.get(view.state, "")), progress, Text(gate))
    return table


def _score(value: Optional[float]) -> str:
    return "" if value is None else f"{value:.2f}"
