"""summary.json: the run in figures, computed from the state and the store."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np

from pipelines.config.schema import Config
from pipelines.data.module import DataModule
from pipelines.dreams.report import dream_summary
from pipelines.experience import DREAM_KEY, Snapshot
from pipelines.gate.probe import Row, read_matrix
from pipelines.machine.state import RunState, Trial
from pipelines.report.events import Timeline, build_timeline, read_events
from pipelines.report.versions import versions


def build_summary(cfg: Config, run_dir: Path, setting: DataModule, state: RunState) -> Dict[str, Any]:
    """The summary of a run, as README.md describes it."""
    wake, flops = state.wake, dict(state.flops)
    flops["total"] = flops["wake"] + flops["sleep"]
    slack = max(1, cfg.pool_period // 50)
    sources = setting.sources
    matrix = read_matrix([Row(**row) for row in state.rows], state.ends, sources, slack)
    wall = max(wake["wall"], 1e-9)
    rounds = [record.to_json() for record in state.rounds]
    controls = summarise_controls(cfg, state, sources, slack)
    return {
        "run": cfg.run.name,
        "strategy": cfg.strategy,
        "sources": sources,
        "base_sources": setting.base_sources,
        "stream_sources": setting.stream_sources,
        **matrix,
        "control": stronger(controls),
        "controls": controls,
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


def summarise_controls(cfg: Config, state: RunState, sources: List[str], slack: int) -> Dict[str, Dict[str, Any]]:
    """Of each strategy its best trial by final mean, and what every step size came to, in the order configured.

    `edge` says that the best step size is the smallest or the largest one tried: it is then a bound, no optimum.
    """
    found: Dict[str, Dict[float, Dict[str, Any]]] = {}
    for name, trial in sorted((Trial.of(name), trial) for name, trial in state.control.items()):
        figures = read_matrix([Row(**row) for row in trial["rows"]], state.ends, sources, slack)
        found.setdefault(name.strategy, {})[name.learning_rate] = {**figures, "flops": trial["flops"]}
    order = dict.fromkeys([*cfg.control.strategies, *found])
    return {strategy: _tuned(found[strategy]) for strategy in order if strategy in found}


def _tuned(trials: Dict[float, Dict[str, Any]]) -> Dict[str, Any]:
    best = min(trials, key=lambda rate: _final(trials[rate]))
    keys = ("mean_final_bpb", "learning", "forgetting")
    tried = [{"learning_rate": rate, **{key: figures[key] for key in keys}} for rate, figures in trials.items()]
    return {**trials[best], "learning_rate": best, "tried": tried, "edge": best in (min(trials), max(trials))}


def stronger(controls: Dict[str, Dict[str, Any]]) -> Optional[Dict[str, Any]]:
    """The control that ends lowest, with the name of its strategy; None without any."""
    if not controls:
        return None
    name = min(controls, key=lambda name: _final(controls[name]))
    return {"strategy": name, **controls[name]}


def _final(figures: Dict[str, Any]) -> float:
    """Final mean; what diverged comes last."""
    mean = float(figures["mean_final_bpb"])
    return mean if math.isfinite(mean) else math.inf


def experiences(cfg: Config, run_dir: Path, setting: DataModule, state: RunState) -> Dict[str, int]:
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
