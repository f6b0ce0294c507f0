"""Controls: what another strategy makes of the same base and stream for the same FLOPs.

A control is a run: the same machine, learner and rounds in simulated time, under another `strategy`. Only its step size
is tuned, over a grid that widens while the best one is at its edge.

Equal FLOPs: a run spends on waking, on rounds and on its gate. A control is given all of that per stream token; what
its own gate will read is known beforehand and taken off, the rest is `sleep.epochs`, which every strategy spends whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Callable, Collection, Dict, List, Mapping, Optional, Tuple

import torch

from nl_model.flops import forward_flops, full_step_flops
from pipelines.compare.widening import Widening, widen
from pipelines.config.load import with_strategy
from pipelines.config.schema import Config
from pipelines.data.module import DataModule
from pipelines.gate.judge import Judge
from pipelines.machine.local import LocalParts
from pipelines.machine.rules import least_rest
from pipelines.machine.simulated import Simulation
from pipelines.machine.state import RunState, Trial
from pipelines.sleep.round import Weights
from pipelines.wake.writes import with_budget

Row = Dict[str, Any]
"""release, tokens and bpb by source, as `pipelines.gate.probe.Row` takes them."""
LEAST_AT_ONCE = 2
"""Trials at a time: the learner's place and that of one rank are free when the stream has ended."""


@dataclass(frozen=True)
class Budget:
    """What the run has spent, and its controls may."""

    flops_per_token: float
    """Of wake and sleep, the gate included."""
    tokens: int
    """Of the stream."""


def at_once(cfg: Config) -> int:
    """How many trials run side by side: in the places that the learner and the pool have given back."""
    if not cfg.trains_controls:
        return 0
    return min(max(LEAST_AT_ONCE, cfg.pool.ranks), len(cfg.control.strategies) * cfg.control.most)


def final_mean(rows: List[Row]) -> float:
    """Mean bits per byte over all sources at the end: what trials are compared by. Infinite where one diverged."""
    values = list(rows[-1]["bpb"].values())
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else math.inf


def search(cfg: Config, strategy: str, control: Mapping[str, Mapping[str, Any]]) -> Widening:
    """Where the search for a strategy's step size stands.

    Args:
        control: finished trials by name (`RunState.control`).
    """
    found = {
        trial.learning_rate: final_mean(control[trial.name]["rows"])
        for trial in map(Trial.of, control)
        if trial.strategy == strategy
    }
    return widen(cfg.control.grid(cfg.base.lr), found, cfg.control.most)


def next_trial(cfg: Config, control: Mapping[str, Mapping[str, Any]], running: Collection[Trial]) -> Optional[Trial]:
    """The trial to start now; None where there is nothing to do until one that runs has ended.

    What lies in a strategy's grid needs no result and is tried side by side; what lies beyond it waits for all of them.
    The strategy with the fewest trials goes first.
    """
    due = []
    for place, strategy in enumerate(cfg.control.strategies):
        started = [trial for trial in running if trial.strategy == strategy]
        done = [trial for trial in map(Trial.of, control) if trial.strategy == strategy]
        grid = [Trial(strategy, rate) for rate in cfg.control.grid(cfg.base.lr)]
        missing = [trial for trial in grid if trial not in started and trial not in done]
        if not missing and not started and (rate := search(cfg, strategy, control).next) is not None:
            missing = [Trial(strategy, rate)]
        if missing:
            due.append((len(started) + len(done), place, missing[0]))
    return min(due)[2] if due else None


def place(
    cfg: Config, control: Mapping[str, Mapping[str, Any]], running: Collection[Trial], trial: Trial
) -> Tuple[int, int]:
    """(which trial this is, counted from 1; of how many that are known to be needed). A search that widens needs more
    than was known before.

    Args:
        control: finished trials by name (`RunState.control`).
        running: those under way, without this one.
    """
    begun = {*map(Trial.of, control), *running, trial}
    grid = {Trial(name, rate) for name in cfg.control.strategies for rate in cfg.control.grid(cfg.base.lr)}
    return len(begun), len(begun | grid)


def control_config(cfg: Config, trial: Trial, budget: Budget, setting: DataModule) -> Config:
    """The configuration of a control, its FLOPs per stream token in `sleep.epochs`.

    Rounds are due every period, whatever the run's are due by: how often the gate reads is then known beforehand.

    Args:
        cfg: of the run.
        setting: the run's text.
    """
    full = float(full_step_flops(cfg.model, cfg.levels, setting.tokenizer.vocab_size))
    changes = {
        "sleep.optimizer.lr": trial.learning_rate,
        "run.deterministic": True,
        "when.policies": ["tokens"],
        "wake.recall": 0,
        "dreams.share": 0.0,
        "control.enabled": "false",
        "report.look_every": 0,
        "pool.ranks": 1,
        "pool.zero_stage": 0,
        "pool.bf16_weights": False,
    }
    found = with_strategy(cfg, trial.strategy, changes)
    per_token = budget.flops_per_token - gate_flops(found, setting, budget.tokens) / max(1, budget.tokens)
    return replace(found, sleep=replace(found.sleep, epochs=max(0.0, per_token) / full))


def gate_flops(cfg: Config, setting: DataModule, tokens: int) -> float:
    """FLOPs that the gate reads for in a run of so many tokens with a round in every period (pipelines/gate/judge.py):
    the candidate on its sequences, the anchor in the first round, the awake model on one source, and the prompts twice.

    Where the learner trains every level its candidates are the awake model. Elsewhere it is not known beforehand how
    many sources a round's text comes from: a control is charged for one, so that it never gets less than its due.
    """
    period = cfg.pool_period
    rounds = tokens // period + (tokens % period >= least_rest(period))
    probes = list(Judge(setting.probes(), cfg).probes.values())
    read = sum(probe.tokens[:, 1:].size for probe in probes)
    asked = sum(min(cfg.gate.prompts, len(probe.tokens)) for probe in probes) * cfg.model.context
    asked *= math.isfinite(cfg.gate.max_divergence)
    forward = float(forward_flops(cfg.model, cfg.levels, setting.tokenizer.vocab_size))
    awake = read / max(1, len(probes)) if cfg.wake.writes != "all" else 0.0
    return forward * (rounds * (read + awake + 2 * asked) + (read if rounds else 0))


def served_rows(state: RunState, cfg: Config) -> List[Row]:
    """A row for the base and for what was served after each round, on text that no decision sees.

    A learner that trains every level goes on with its own weights whatever the gate says of them, so each of its rounds
    shows what it is; elsewhere the releases are what is served.
    """
    if cfg.wake.writes != "all":
        return list(state.rows)
    rounds = [{"release": record.id, "tokens": record.tokens, "bpb": record.row} for record in state.rounds]
    return [*state.rows[:1], *rounds]


def run_control(
    cfg: Config, setting: DataModule, base: Weights, on_rows: Callable[[List[Row]], None]
) -> Tuple[List[Row], float]:
    """Run a control from release 0 to the end of the stream; returns its rows and the FLOPs spent, gate included.

    Args:
        cfg: of `control_config`.
        setting: of that configuration.
        on_rows: called with the rows so far whenever a round has ended.
    """
    cfg = with_budget(cfg, setting.tokenizer.vocab_size)
    setting = replace(setting, cfg=cfg)
    torch.manual_seed(cfg.run.seed)
    parts = LocalParts(cfg, setting, base)

    def note(kind: str, fields: Dict[str, Any]) -> None:
        if kind in ("matrix_row", "gate"):
            on_rows(served_rows(run.machine.state, cfg))
            _forget(parts)

    run = Simulation(parts.rules, parts, note=note)
    state = run.finish()
    return served_rows(state, cfg), state.flops["wake"] + state.flops["sleep"]


def _forget(parts: LocalParts) -> None:
    """Drop releases that nobody goes back to: a run of many rounds would hold them all in memory."""
    kept = parts.memory.kept  # not newest(), which copies every tensor
    needed = {0, max(parts.releases), int(kept[1]["release"]) if kept is not None else 0}
    for number in [n for n in parts.releases if n not in needed and n < max(parts.releases) - 1]:
        del parts.releases[number]
