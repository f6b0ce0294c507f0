"""Runs the controls side by side, one process per step size, and keeps the rows of each."""

from __future__ import annotations

from typing import Any, Callable, Collection, Dict, List, Tuple

import ray
from ray.exceptions import RayError

from cluster.actors.control_trainer import ControlTrainer
from cluster.actors.start import results, start_actor
from cluster.driver.failures import RunFailed, describe
from pipelines.config.schema import Config


def train_controls(
    cfg: Config,
    arguments: Tuple[Config, Dict[str, Any]],
    base_dir: str,
    flops_per_token: float,
    trained: Collection[str],
    emit: Callable[..., Any],
    tell: Callable[[str, List[Dict[str, Any]], float], None],
    check_stop: Callable[[], None],
) -> None:
    """Train a control for every step size that has no rows yet. Runs in a thread of its own.

    Args:
        flops_per_token: what the run spent per stream token, and each control is to spend.
        trained: step sizes that have rows.
        tell: takes step size, rows and FLOPs of each that has ended.
        check_stop: raises where the run is ending.
    """
    gpus = cfg.ray.gpus if cfg.compute.device == "cuda" else 0.0
    actors = {
        lr: start_actor(ControlTrainer, *arguments, control=True, num_cpus=cfg.ray.rank_cpus, num_gpus=gpus)
        for lr in cfg.control.learning_rates
        if f"{lr:g}" not in trained
    }
    try:
        calls = {actor.train.remote(base_dir, lr, flops_per_token): lr for lr, actor in actors.items()}
        shown, ended = {lr: 0 for lr in actors}, {}
        while calls:
            check_stop()
            done, _ = ray.wait(list(calls), timeout=0.5)
            for reference in done:
                lr = calls.pop(reference)
                ended[lr], flops = ray.get(reference)
                tell(f"{lr:g}", ended[lr], flops)
            for lr, actor in actors.items():
                rows = ended.get(lr) or results([actor.progress.remote()], cfg.failures.call_timeout)[0][1]
                for row in rows[shown[lr] :]:
                    emit("control", learning_rate=lr, tokens=row["tokens"], row=row["bpb"])
                shown[lr] = len(rows)
    except RayError as error:
        raise RunFailed(f"a control died: {describe(error)}; the same command trains it again") from error
    finally:
        for actor in actors.values():
            ray.kill(actor)
