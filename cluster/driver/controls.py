"""Runs the controls side by side, one process per step size, and keeps the rows of each."""

from __future__ import annotations

from typing import Any, Callable, Dict, Tuple

import ray
from ray.exceptions import RayError

from cluster.actors.control_trainer import ControlTrainer
from cluster.actors.start import results, start_actor
from cluster.driver.failures import RunFailed, describe
from cluster.driver.state import RunState
from pipelines.config.schema import Config


def train_controls(
    cfg: Config,
    arguments: Tuple[Config, Dict[str, Any]],
    base_dir: str,
    state: RunState,
    emit: Callable[..., Any],
    check_stop: Callable[[], None],
) -> None:
    """Train a control for every step size that has no rows yet. Each spends per stream token what the run spent."""
    flops_per_token = (state.flops["wake"] + state.flops["sleep"]) / max(1, state.tokens)
    gpus = cfg.ray.gpus if cfg.compute.device == "cuda" else 0.0
    wanted = [lr for lr in cfg.control.learning_rates if f"{lr:g}" not in state.control]
    actors = {
        lr: start_actor(ControlTrainer, *arguments, control=True, num_cpus=cfg.ray.rank_cpus, num_gpus=gpus)
        for lr in wanted
    }
    try:
        calls = {actor.train.remote(base_dir, lr, flops_per_token): lr for lr, actor in actors.items()}
        shown = {lr: 0 for lr in wanted}
        while calls:
            check_stop()
            done, _ = ray.wait(list(calls), timeout=0.5)
            for reference in done:
                lr = calls.pop(reference)
                state.control[f"{lr:g}"], state.flops["control"] = ray.get(reference)
            for lr, actor in actors.items():
                rows = (
                    state.control.get(f"{lr:g}") or results([actor.progress.remote()], cfg.failures.call_timeout)[0][1]
                )
                for row in rows[shown[lr] :]:
                    emit("control", learning_rate=lr, tokens=row["tokens"], row=row["bpb"])
                shown[lr] = len(rows)
    except RayError as error:
        raise RunFailed(f"a control died: {describe(error)}; the same command trains it again") from error
    finally:
        for actor in actors.values():
            ray.kill(actor)
