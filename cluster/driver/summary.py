"""summary.json: the run in figures, computed from the state and the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np

from pipelines.config.schema import Config
from pipelines.data.module import Setting
from pipelines.dreams.report import dream_summary
from pipelines.experience import DREAM_KEY, Snapshot
from pipelines.gate.probe import Row, read_matrix
from pipelines.machine.state import RunState
from pipelines.report.events import Timeline, build_timeline, read_events
from pipelines.report.versions import versions


def build_summary(cfg: Config, run_dir: Path, setting: Setting, state: RunState) -> Dict[str, Any]:
    """The summary of a run, as README.md describes it."""
    wake, flops = state.wake, dict(state.flops)
    flops["total"] = flops["wake"] + flops["sleep"]
    slack = max(1, min(level.period for level in cfg.levels.values() if level.owner == "pool") // 50)
    sources = setting.sources
    matrix = read_matrix([Row(**row) for row in state.rows], state.ends, sources, slack)
    wall = max(wake["wall"], 1e-9)
    rounds = [record.to_json() for record in state.rounds]
    return {
        "run": cfg.run.name,
        "sources": sources,
        "base_sources": setting.base_sources,
        "stream_sources": setting.stream_sources,
        **matrix,
        "control": _control(state, sources, slack),
        **_online(run_dir),
        "rounds": rounds,
        "dreams": dream_summary(rounds),
        "tokens_streamed": state.tokens,
        "wake_tokens_per_second": wake["tokens"] / max(wake["inside"], 1e-9),
        "system_overhead": 1.0 - wake["inside"] / wall,
        "log_wait_share": wake.get("waited", 0.0) / wall,
        "experiences": experiences(cfg, run_dir, setting, state),
        "flops": flops,
        "stream_cursor": state.cursor,
        "quarantined": state.quarantined,
        "seconds": state.seconds,
        "versions": versions(),
    }


def _online(run_dir: Path) -> Dict[str, Optional[float]]:
    """Online loss of the stream, of the weights alone and read together with recall, as the journal has it."""
    journal = run_dir / "events.jsonl"
    timeline = build_timeline(read_events(journal)) if journal.exists() else Timeline()
    return {"online_bpb": timeline.read.bpb, "recalled_bpb": timeline.read.recalled_bpb}


def _control(state: RunState, sources: List[str], slack: int) -> Dict[str, Any] | None:
    """The best control by final mean, and what every step size came to."""
    if not state.control:
        return None
    figures = {
        lr: read_matrix([Row(**row) for row in rows], state.ends, sources, slack) for lr, rows in state.control.items()
    }
    best = min(figures, key=lambda lr: figures[lr]["mean_final_bpb"])  # type: ignore[arg-type,return-value]
    keys = ("mean_final_bpb", "learning", "forgetting")
    tried = [{"learning_rate": float(lr), **{k: found[k] for k in keys}} for lr, found in figures.items()]
    return {**figures[best], "learning_rate": float(best), "tried": tried}


def experiences(cfg: Config, run_dir: Path, setting: Setting, state: RunState) -> Dict[str, int]:
    """Count the store against the stream: every key up to the learner's position must be there exactly once."""
    snapshot = Snapshot.open(run_dir / "store")
    keys = np.asarray(snapshot.keys)
    streamed = keys[(keys >= 0) & (keys < DREAM_KEY)]
    expected = state.tokens // cfg.model.context
    distinct = np.unique(streamed)
    return {
        "committed": len(distinct),
        "duplicates": len(streamed) - len(distinct),
        "lost": int(expected - np.count_nonzero(distinct < expected)),
        "base": int(np.count_nonzero(keys < 0)),
        "dreams": int(np.count_nonzero(keys >= DREAM_KEY)),
        "quarantined": len(state.quarantined),
    }
