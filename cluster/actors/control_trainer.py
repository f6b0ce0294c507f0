"""Actor `ControlTrainer`: runs one control after the other, beside its like."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Tuple

import ray
import torch

from cluster.actors.start import configure_torch
from cluster.storage.releases import load_release
from nl_model.weights import split
from pipelines.config.schema import Config
from pipelines.data.module import open_data
from pipelines.machine.control import Budget, Row, control_config, run_control
from pipelines.machine.state import Trial


class ControlTrainer:
    """Runs controls in simulated time, from the base that the run began with.

    Args:
        cfg: of the run.
        tokenizer_state: of the run.
    """

    def __init__(self, cfg: Config, tokenizer_state: Dict[str, Any]) -> None:
        configure_torch(cfg)
        torch.use_deterministic_algorithms(True, warn_only=True)
        self.cfg, self.setting = cfg, open_data(cfg, tokenizer_state)
        self.shown: Tuple[str, List[Row]] = ("", [])

    def ready(self) -> None:
        """Answers once the cluster has found a place for it."""

    def train(self, trial: Trial, budget: Budget, base_dir: str) -> Tuple[List[Row], float]:
        """Run one control; returns its rows and the FLOPs spent."""
        cfg = control_config(self.cfg, trial, budget, self.setting)

        def show(rows: List[Row]) -> None:
            self.shown = (trial.name, rows)

        base = split(load_release(Path(base_dir)), "weight")
        return run_control(cfg, replace(self.setting, cfg=cfg), base, show)

    @ray.method(concurrency_group="control")
    def progress(self) -> Tuple[str, List[Row]]:
        """Name of the trial that was last told of, and its rows so far."""
        return self.shown
