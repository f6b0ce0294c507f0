"""Actor `ControlTrainer`: trains one plain control beside the others, one step size each."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, List, Tuple

import ray

from cluster.actors.start import configure_torch
from cluster.storage.releases import load_release, split
from nl_model.model import NestedLM, resolve_device
from nl_model.weights import load_into
from pipelines.config.schema import Config
from pipelines.data.module import open_setting
from pipelines.gate.probe import Row
from pipelines.sleep.control import train_control


class ControlTrainer:
    """Starts from the base, sees the stream in the same order, spends the FLOPs it is given."""

    def __init__(self, cfg: Config, tokenizer_state: Dict[str, Any]) -> None:
        configure_torch(cfg)
        self.cfg, self.setting = cfg, open_setting(cfg, tokenizer_state)
        self.rows: List[Row] = []
        self.steps = 0

    def train(self, base_dir: str, lr: float, flops_per_token: float) -> Tuple[List[Dict[str, Any]], float]:
        """Train with one step size; returns the rows of its matrix and the FLOPs spent."""
        cfg, setting = self.cfg, self.setting
        model = NestedLM(cfg.model, cfg.levels, setting.tokenizer.vocab_size).to(resolve_device(cfg.compute.device))
        load_into(model, split(load_release(Path(base_dir)), "weight"))
        rows, flops = train_control(
            model,
            setting.stream(),
            setting.probes(),
            setting.sources,
            cfg,
            lr,
            flops_per_token,
            self.rows.append,
            self._count,
        )
        return [asdict(row) for row in rows], flops

    def _count(self, steps: int) -> None:
        self.steps = steps

    @ray.method(concurrency_group="control")
    def progress(self) -> Tuple[int, List[Dict[str, Any]]]:
        """Steps done and rows so far."""
        return self.steps, [asdict(row) for row in list(self.rows)]
