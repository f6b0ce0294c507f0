"""Joint training: all text at once, what a stream's learner is measured against. The same step, loop and replay."""

from __future__ import annotations

from dataclasses import replace
from typing import Dict

import numpy as np
import torch
from torch import Tensor

from nl_model.model import NestedLM
from pipelines.config.schema import Config
from pipelines.experience.replay import Experience, Replay, usable
from pipelines.sleep.base import TrueTokens
from pipelines.sleep.engine import LocalEngine
from pipelines.sleep.schedule import Schedule
from pipelines.sleep.training import ALONE, Batch, Place, train


class ReplayedBatches:
    """Batches drawn from all that a store holds, balanced by source as configured: a function of (seed, step)."""

    def __init__(self, experience: Experience, cfg: Config) -> None:
        whole = replace(cfg.sleep, replay_bytes=0)
        self.experience, self.size, self.seed = experience, cfg.sleep.batch, cfg.run.seed
        self.replay = Replay(experience, np.flatnonzero(usable(experience)), whole, cfg.run.seed)

    def batch(self, step: int, place: Place = ALONE) -> Batch:
        """One rank's share of a step."""
        rows = self.replay.draw(self.size, self.seed, step)[place.rank :: place.world]
        tokens_BS = torch.from_numpy(self.experience.tokens(rows).astype(np.int64))
        return Batch(tokens_BS, torch.ones(len(rows), dtype=torch.bool), self.experience.keys[rows])


def train_jointly(cfg: Config, model: NestedLM, experience: Experience, steps: int) -> Dict[str, Tensor]:
    """Train every level on all text, warmed up and cooled down once; returns the weights.

    Args:
        model: as it starts, on its device.
        experience: all text.
        steps: of sleep.batch sequences.
    """
    engine = LocalEngine(model, cfg.sleep.optimizer)
    schedule = Schedule("cosine", cfg.sleep.optimizer.lr, steps)
    device = next(model.parameters()).device
    train(engine, TrueTokens(), ReplayedBatches(experience, cfg), schedule, device, precision=cfg.compute.precision)
    return dict(engine.weights())
