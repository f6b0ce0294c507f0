"""A finished run, called again: it says so, what is new in its data since, and how a new run goes on with it."""

from __future__ import annotations

import json
import re
import shlex
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from rich.console import Console

from cluster.driver.state import load_state
from cluster.storage.releases import Releases
from nl_model.weights import write_durably
from pipelines.config.schema import Config
from pipelines.data.facts import DataFacts, data_facts
from pipelines.data.module import open_data
from pipelines.data.printable import printable
from pipelines.machine.state import Phase, RunState

FINISHED, DATA = "checkpoints/finished.json", "checkpoints/data.json"
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_NOT_TEXT = ("true", "false", "null", "none", "yes", "no", "on", "off", "nan", "inf", "infinity", "y", "n")


@dataclass(frozen=True)
class Finished:
    """What is remembered of the end of a run."""

    time: float
    """Unix seconds."""
    tokens: int
    live: int
    """Release that was live; a rollback since makes another one live, and then there is something to do again."""
    rows: int
    """Rows of the matrix that the summary is of."""


@dataclass(frozen=True)
class Growth:
    """What sources hold now that they did not hold when the run began."""

    sources: Tuple[str, ...]
    """Those that are new, and those that hold more."""
    documents: int
    size: int
    """Bytes; approximate for rows of tables."""
    gone: Tuple[str, ...] = ()
    """Sources that hold less, or are not there any more."""


def keep_data(run_dir: Path, facts: DataFacts) -> None:
    """Remember what the sources held when the run began, once."""
    if not (run_dir / DATA).exists():
        held = {source.name: [source.documents, source.size] for source in facts.sources}
        write_durably(run_dir / DATA, json.dumps(held).encode())


def keep_finished(run_dir: Path, state: RunState) -> None:
    """Remember that all is done: summary, report and tracking too."""
    told = Finished(time.time(), state.tokens, state.live, len(state.rows))
    write_durably(run_dir / FINISHED, json.dumps(vars(told)).encode())


def read_finished(run_dir: Path) -> Optional[Finished]:
    """The end of a run that has nothing left to do; None where it has."""
    if not all((run_dir / name).is_file() for name in (FINISHED, "summary.json", "report.html")):
        return None
    told, state = Finished(**json.loads((run_dir / FINISHED).read_text())), load_state(run_dir)
    newest = Releases(run_dir / "releases").numbers()[-1:]
    done = state.phase is Phase.FINISHED and (told.live, told.rows) == (state.live, len(state.rows))
    return told if done and newest == [state.live] else None


def growth(before: Dict[str, Any], facts: DataFacts) -> Growth:
    """What the sources of a run hold more, or less, than they did.

    Args:
        before: [documents, bytes] by source.
    """
    now = {source.name: (source.documents, source.size) for source in facts.sources}
    more = [name for name in now if now[name] > tuple(before.get(name, (0, 0)))]
    gone = tuple(name for name, held in before.items() if now.get(name, (0, 0)) < tuple(held))
    added = [[now[name][i] - before.get(name, (0, 0))[i] for i in (0, 1)] for name in more]
    return Growth(tuple(more), sum(item[0] for item in added), sum(item[1] for item in added), gone)


def tell_finished(console: Console, cfg: Config, run_dir: Path, told: Finished) -> None:
    """Show the figures of a finished run again, and say what can be done with new data."""
    from pipelines.report.page import read_summary, render_summary_table  # noqa: PLC0415 (plots load slowly)

    summary = read_summary(run_dir)
    console.print(render_summary_table(summary))
    for line in finished_lines(cfg, run_dir, told, summary["sources"]):
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def finished_lines(cfg: Config, run_dir: Path, told: Finished, known: List[str]) -> List[str]:
    """That a run is finished, what is new in its data, and the command that goes on with it.

    Args:
        known: sources that it has learned.
    """
    date = datetime.fromtimestamp(told.time).strftime("%Y-%m-%d %H:%M")
    lines = [
        f"report: {run_dir / 'report.html'}",
        f"run {cfg.run.name} is finished ({told.tokens:,} tokens, {date}); it reads nothing more, whatever is added",
    ]
    new: Optional[Growth] = None
    if cfg.stream.path is not None and (run_dir / DATA).is_file():
        try:
            new = growth(json.loads((run_dir / DATA).read_text()), data_facts(open_data(cfg)))
        except ValueError as error:
            lines.append(f"its data is not what it was: {error}")
    if new is not None and new.sources:
        lines.append(
            f"new since it began: about {new.size:,} bytes, {new.documents:,} documents in {', '.join(new.sources)}"
        )
    if new is not None and new.gone:
        lines.append(f"less than when it began is in {', '.join(new.gone)}")
    if cfg.stream.path is None:
        lines.append("a new run learns data of your own from its last release, and replays the sources named for it:")
        return [*lines, f"  {command(run_dir, told, [], [], 'DIR')} 'base.sources=[...]'"]
    streamed = list(new.sources) if new is not None else []
    lines.append(
        "a new run learns it from the last release of this one, and replays what this one learned:"
        if streamed
        else f"new data goes below {cfg.stream.path} under a name of its own, here NEW; a new run then learns it from "
        "the last release of this one, and replays what this one learned:"
    )
    return [*lines, f"  {command(run_dir, told, streamed or ['NEW'], known)}"]


def command(run_dir: Path, told: Finished, streamed: List[str], known: List[str], path: Optional[str] = None) -> str:
    """The command line of a new run with this one's configuration that starts from its last release.

    Args:
        streamed: sources that the new run streams.
        known: sources that this one has learned.
        path: of other data than this run's.
    """
    words = [
        str(run_dir / "config.yaml"),
        f"run.name={_free_name(run_dir)}",
        f"base.checkpoint={Releases(run_dir / 'releases').directory(told.live)}",
        *([f"base.sources={_names(known)}"] if known else []),
        f"stream.sources={_names(streamed)}",
        *([f"stream.path={path}"] if path else []),
    ]
    return f"circadian run {' '.join(shlex.quote(word) for word in words)}"


def _names(names: List[str]) -> str:
    plain = [_PLAIN.fullmatch(name) and name.lower() not in _NOT_TEXT for name in names]
    shown = [name if simple else json.dumps(name) for name, simple in zip(names, plain, strict=True)]
    return f"[{','.join(shown)}]"


def _free_name(run_dir: Path) -> str:
    number = 2
    while (run_dir.parent / f"{run_dir.name}-{number}").exists():
        number += 1
    return f"{run_dir.name}-{number}"
