"""One trial: a method on one order of the stream, from the base to the last look, on the machine of a run.

Nothing here trains: `LocalParts` is learner, rounds and gate of `circadian run`, and `Simulation` drives them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Dict, Optional

import torch
from torch import Tensor

from nl_model.flops import full_step_flops
from nl_model.model import NestedLM, resolve_device
from nl_model.weights import load_into
from pipelines.compare.data import TrialData, configured_bytes
from pipelines.compare.measure import Journal, curve, read_looks, read_online, read_rounds, read_rows
from pipelines.compare.methods import Method
from pipelines.compare.options import REGIMES
from pipelines.config.schema import Config
from pipelines.data.module import DataModule
from pipelines.experience.memory import MemoryStore
from pipelines.gate.judge import Judge
from pipelines.gate.probe import score
from pipelines.machine.local import LocalParts
from pipelines.machine.simulated import Simulation, Speeds
from pipelines.sleep.base import base_records
from pipelines.sleep.joint import train_jointly
from pipelines.wake.hooks import HookCosts
from pipelines.wake.writes import pool_flops, wake_flops, with_budget


@dataclass(frozen=True)
class Trial:
    """What is done, all of it decided."""

    method: Method
    cfg: Config
    """Of the method, with its step size, seed and store; its budget is in sleep.epochs."""
    data: TrialData
    clock: str = "fixed"
    looks: int = 20


def configure(cfg: Config, method: Method, data: TrialData, regime: str, seed: int, lr: Optional[float]) -> Config:
    """The configuration of one trial out of its method's.

    A store's bound is in bytes of whatever is stored: what a hook keeps beside a token leaves room for fewer tokens.
    """
    found = replace(
        cfg,
        run=replace(cfg.run, seed=seed, deterministic=True),
        pool=replace(cfg.pool, ranks=1, zero_stage=0, bf16_weights=False),
        control=replace(cfg.control, enabled="false"),
    )
    if lr is not None:
        found = replace(found, sleep=replace(found.sleep, optimizer=replace(found.sleep.optimizer, lr=lr)))
    if share := REGIMES[regime]:
        setting = data.setting
        costs = method.build_hook().costs(found, setting.tokenizer.vocab_size)
        most = share * configured_bytes(cfg, len(setting.stream_sources)) / (1.0 + costs.stored)
        found = replace(found, sleep=replace(found.sleep, replay_bytes=max(1, int(most))))
    return found


def run_trial(trial: Trial, base: Dict[str, Tensor]) -> Dict[str, Any]:
    """Do a trial; returns what it found, JSON-able.

    Args:
        base: weights of release 0, the same for all methods of a seed.
    """
    start = time.perf_counter()
    torch.manual_seed(trial.cfg.run.seed)
    found = _joint(trial, base) if trial.method.joint else _simulated(trial, base)
    return {**found, "sources": trial.data.setting.sources, "seconds": time.perf_counter() - start}


def _simulated(trial: Trial, base: Dict[str, Tensor]) -> Dict[str, Any]:
    vocab = trial.data.setting.tokenizer.vocab_size
    hook = trial.method.build_hook()
    costs = hook.costs(trial.cfg, vocab)
    every = max(1, trial.data.tokens // trial.looks)
    cfg = replace(with_budget(trial.cfg, vocab, costs), report=replace(trial.cfg.report, look_every=every))
    if trial.clock == "speeds":
        cfg = replace(cfg, run=replace(cfg.run, deterministic=False))
    setting, journal = trial.data.of(cfg), Journal()
    parts = LocalParts(setting.cfg, setting, base, hook)
    run = Simulation(parts.rules, parts, speeds(cfg, vocab, costs, trial.clock), note=journal.note)
    state = run.finish()
    awake, asleep = sum(step["flops"] for step in journal.steps), sum(r.flops for r in state.rounds)
    return {
        **read_looks(journal.looks),
        **read_rows(state, setting.sources, run.rules.step_tokens),
        "online_bpb": read_online(journal.steps, "bpb"),
        "recalled_bpb": read_online(journal.steps, "recalled"),
        "curve": curve(journal.steps),
        "rounds": read_rounds(state.rounds),
        "stored_bytes": _stored(cfg, setting, len(parts.store.records), costs),
        **_flops(cfg, vocab, state.tokens, {"wake": awake, "sleep": asleep}),
    }


def speeds(cfg: Config, vocab_size: int, costs: HookCosts, clock: str) -> Speeds:
    """How fast learner and pool are: the pool needs as long for what a period brings as the learner for the period."""
    if clock == "fixed":  # the places of adoptions are fixed by stream position: no speed matters
        return Speeds()
    awake = wake_flops(cfg, vocab_size, costs)
    asleep = cfg.sleep.tokens_per_token * pool_flops(cfg, vocab_size)
    return Speeds(learner=awake, pool=asleep or awake, unit="flops")


def _stored(cfg: Config, setting: DataModule, rows: int, costs: HookCosts) -> float:
    """Most bytes of text, and of what stands beside it, that are read back: replayed text, and a round's own."""
    context = cfg.model.context
    past = rows * context if not cfg.sleep.replay_bytes else min(cfg.sleep.replay_bytes, rows * context)
    if cfg.wake.writes == "all":
        return (1.0 + costs.stored) * past if cfg.wake.replay else 0.0
    return float(min(past + cfg.pool_period, rows * context))


def _joint(trial: Trial, base: Dict[str, Tensor]) -> Dict[str, Any]:
    """All text at once for the same FLOPs; there is no stream, so nothing but the end is measured."""
    cfg, data = trial.cfg, trial.data
    setting = data.of(cfg)
    store = MemoryStore(cfg.model.context, setting.tokenizer.dtype)
    store.append(base_records([*data.base(cfg), *data.sequences]))
    model = NestedLM(cfg.model, cfg.levels, setting.tokenizer.vocab_size).to(resolve_device(cfg.compute.device))
    load_into(model, base)
    size = cfg.sleep.batch * cfg.model.context
    steps = round(cfg.sleep.epochs * data.tokens / size)
    train_jointly(cfg, model, store.at(), steps)
    final = score(model, Judge(setting.probes(), cfg).reported, setting.sources, cfg.compute.precision)
    full = full_step_flops(cfg.model, cfg.levels, setting.tokenizer.vocab_size)
    return {
        "final_bpb": sum(final.values()) / len(final),
        "worst_bpb": max(final.values()),
        **_flops(cfg, setting.tokenizer.vocab_size, data.tokens, {"wake": 0.0, "sleep": float(steps * size * full)}),
    }


def _flops(cfg: Config, vocab_size: int, tokens: int, kinds: Dict[str, float]) -> Dict[str, Any]:
    """FLOPs by kind, and in full training steps per token of the stream."""
    kinds = {**kinds, "total": sum(kinds.values())}
    unit = float(tokens * full_step_flops(cfg.model, cfg.levels, vocab_size))
    return {"flops": kinds, "steps_per_token": {kind: value / unit for kind, value in kinds.items()}}
