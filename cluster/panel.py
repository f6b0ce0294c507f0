"""The panel that somebody sees who watches a run in a terminal: never wider or taller than it, whatever there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.view_state import LevelView, RoundView, TrialView, ViewState
from pipelines.report.events import describe_round, short_number

LIT_SECONDS = 2.0  # how long a written level stays lit
DECISIONS = {"promoted": "green", "rejected": "red"}
MARGIN = 3
"""Columns that stay free at the right: what a terminal echoes (^C) then breaks no line."""
WIDE = 110
"""Columns from which sources and rounds stand side by side."""
FRAME = 4
"""Lines of the frame, the bar and the levels."""


@dataclass(frozen=True)
class Room:
    """How many rows each part gets."""

    sources: int
    rounds: int
    messages: int

    @classmethod
    def share(cls, height: int, wanted: Room, side_by_side: bool) -> Room:
        """Hand out the lines of a terminal: to each part what it wants, as long as there are any; sources first.

        Args:
            height: lines of the terminal.
            wanted: rows that there are.
        """
        left = height - 1 - FRAME  # the last line is the cursor's
        heads = [bool(wanted.sources), bool(wanted.rounds) and not side_by_side, bool(wanted.messages)]
        left -= 2 * sum(heads[:2]) + heads[2]  # a head and a blank line for each table, a blank line for messages
        given = [0, 0, 0]
        limits = [wanted.sources, wanted.rounds, wanted.messages]
        while left > 0 and any(have < limit for have, limit in zip(given, limits, strict=True)):
            for part in (0, 1, 2):
                if left > 0 and given[part] < limits[part]:
                    given[part] += 1
                    left -= 0 if part == 1 and side_by_side and given[1] <= given[0] else 1
        return cls(*given)


def render(state: ViewState, run_name: str, width: int = 100, height: int = 50) -> RenderableType:
    """The panel of a state for a terminal of so many columns and lines."""
    inner, second = width - MARGIN - 4, len(state.trials) if state.phase == "control" else len(state.rounds)
    side_by_side = width >= WIDE and bool(state.sources) and bool(second)
    room = Room.share(height, Room(len(state.sources), second, len(state.messages)), side_by_side)
    column = inner // 2 - 4 if side_by_side else inner
    left = _render_sources(state, room.sources, column)
    show = _render_trials if state.phase == "control" else _render_rounds
    right = show(state, room.rounds, column)
    parts: list[RenderableType] = [_render_progress(state, inner), _render_levels(state)]
    if side_by_side and left is not None and right is not None:
        both = Table.grid(padding=(0, 4, 0, 0), expand=True)
        both.add_column(ratio=1)
        both.add_column(ratio=1)
        both.add_row(left, right)
        parts += [Text(), both]
    else:
        parts += [part for table in (left, right) if table is not None for part in (Text(), table)]
    if room.messages:
        newest = list(state.messages)[-room.messages :]
        parts += [Text(), *(Text(one, style="dim", overflow="ellipsis", no_wrap=True) for one in newest)]
    header = Text.assemble((run_name or "circadian", "bold"), "  ", (state.phase, "cyan"), f"  release {state.release}")
    header.truncate(max(1, inner - 4), overflow="ellipsis")
    return Panel(Group(*parts), title=header, title_align="left", padding=(0, 1), width=max(8, width - MARGIN))


def _render_progress(state: ViewState, width: int) -> RenderableType:
    """How far what the run is doing is, and how fast."""
    done, total, text = state.tokens, max(1, state.stream_tokens, state.tokens), "tokens"
    if state.phase in ("base", "starting"):
        done, total, text = state.base_tokens, max(1, state.base_of), "tokens of the base"
        if not state.base_of:
            return Text("the base is being prepared" if state.phase == "base" else "starting")
    if state.phase == "control":
        done, total, text = state.trials_done, max(1, state.trials_planned, state.trials_done), "trials of controls"
    words = f"{done:,} of {total:,} {text}"
    if state.tokens_per_second and state.phase in ("base", "wake"):
        words += f"  {short_number(state.tokens_per_second)} tok/s"
    bar = Table.grid(padding=(0, 2, 0, 0))
    bar.add_column(no_wrap=True)
    bar.add_column(no_wrap=True, overflow="ellipsis")
    bar.add_row(ProgressBar(total=total, completed=done, width=max(8, min(80, width - len(words) - 4))), words)
    return bar


def _render_levels(state: ViewState) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")

    def period(name: str) -> int:
        return state.levels[name].period

    for name in sorted(state.levels, key=period):
        level: LevelView = state.levels[name]
        style = "bold black on bright_yellow" if state.now - level.last < LIT_SECONDS else "dim"
        text.append(f" {name} ", style=style)
        text.append(f" {level.writes:,} writes    ")
    return text


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, no_wrap=True, overflow="ellipsis")
    return table


def _fitted(text: str, width: int) -> Text:
    """A text that takes no more than so many columns: rich would shorten the columns beside it as well."""
    fitted = Text(text, no_wrap=True, overflow="ellipsis")
    fitted.truncate(max(6, width), overflow="ellipsis")
    return fitted


def _render_sources(state: ViewState, rows: int, width: int) -> Optional[Table]:
    """Scores by source. Where there is no room for all, those that are read now, then those that come first."""
    if not rows:
        return None
    columns = {"online bpb": state.online, "last probe": state.probe, "final": state.final}
    if state.recalled:
        columns = {"online bpb": state.online, "with recall": state.recalled, **columns}
    left = width - sum(len(column) + 2 for column in columns) - 2
    table = _table(f"source ({rows} of {len(state.sources)})" if rows < len(state.sources) else "source")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    first = sorted(state.sources, key=lambda source: source not in state.current)[:rows]
    for source in (source for source in state.sources if source in first):
        cells = [_score(scores.get(source)) for scores in columns.values()]
        table.add_row(_fitted(source, left), *cells, style="bold" if source in state.current else "")
    return table


def _render_rounds(state: ViewState, rows: int, width: int) -> Optional[Table]:
    """The newest rounds: how far one is, then what the gate said."""
    if not rows:
        return None
    table = _table("round", "state", "progress, then the gate")
    for number in sorted(state.rounds)[-rows:]:
        view = state.rounds[number]
        table.add_row(str(number), Text(view.state, style=DECISIONS.get(view.state, "")), _round_text(view, width - 19))
    return table


def _round_text(view: RoundView, width: int) -> RenderableType:
    if view.state in DECISIONS:
        figures = describe_round(view.state, view.figures).partition(": ")[2]
        return _fitted(view.reason if view.state == "rejected" and view.reason else figures, width)
    if not view.steps:
        return Text()
    loss = "" if view.loss is None else f"  loss {view.loss:.3f}"
    return _bar(view.step, view.steps, f"{view.step}/{view.steps}{loss}")


def _render_trials(state: ViewState, rows: int, width: int) -> Optional[Table]:
    """The newest trials of controls: how far along the stream, then what they ended at."""
    if not rows:
        return None
    table = _table("trial", "control", "step size", "progress, then the final mean")
    newest: Sequence[TrialView] = list(state.trials.values())[-rows:]
    for view in newest:
        far = _bar(view.tokens, max(1, state.tokens), f"{view.tokens:,} tokens")
        number = f"{view.number} of {view.planned}" if view.number else ""
        table.add_row(
            number,
            Text(view.strategy),
            f"{view.learning_rate:g}",
            _fitted(view.ending, width - 38) if view.ending else far,
        )
    return table


def _bar(done: int, total: int, words: str) -> Table:
    bar = Table.grid(padding=(0, 1))
    bar.add_row(ProgressBar(total=total, completed=done, width=16), Text(words, no_wrap=True, overflow="ellipsis"))
    return bar


def _score(value: Optional[float]) -> str:
    return "" if value is None else f"{value:.2f}"
