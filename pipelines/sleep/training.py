"""The training step, and the loop around it. Rounds, bases, online replay and every opponent train here.

Shapes: B sequences, S stored tokens (context + 1), T = S - 1 predicted tokens.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Mapping, Optional, Protocol, Tuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nl_model.model import autocast
from pipelines.sleep.average import WeightAverage
from pipelines.sleep.engine import Engine, Steps
from pipelines.sleep.schedule import Schedule

Keys = npt.NDArray[np.int64]
LAST = 5
"""Losses are reported as means over the last 1 / LAST of the steps."""


@dataclass(frozen=True)
class Batch:
    """What one rank trains on in one step."""

    tokens_BS: Tensor
    """int64."""
    recent_B: Tensor
    """bool: which sequences are recent (or dreamt): the teacher guides these, the anchor the others."""
    keys_B: Keys
    """Keys of the sequences; what is sampled for them depends on these and on nothing else."""

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(self.tokens_BS.to(device), self.recent_B.to(device), self.keys_B)

    def rows(self, every: slice) -> Batch:
        """Some of the sequences."""
        return Batch(self.tokens_BS[every], self.recent_B[every], self.keys_B[every])


@dataclass(frozen=True)
class Place:
    """Which of how many processes this one is; batches, files and scores are shared out by it."""

    rank: int = 0
    world: int = 1


ALONE = Place()


class Batches(Protocol):
    """Batches as a pure function of the step."""

    def batch(self, step: int, place: Place = ALONE) -> Batch:
        """One rank's share of a step."""


class Objective(Protocol):
    """The loss of every step: a function of (models, seed, step, batch)."""

    def loss(self, step: int, forward: Callable[[Tensor], Tensor], batch: Batch) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Mean loss of a pass in nats per token, with gradient, and its detached parts by name."""


def training_step(
    engine: Steps, objective: Objective, step: int, batch: Batch, lr: float, precision: str = "fp32"
) -> Dict[str, float]:
    """One step in as many passes as the engine makes of it; returns the losses, means over the passes.

    This is the only place where a loss, a backward pass and a write meet.
    """
    found: Dict[str, List[Tensor]] = defaultdict(list)
    for i in range(engine.passes):
        part = batch.rows(slice(i, None, engine.passes))  # every pass has its share of recent and of old experience
        with autocast(part.tokens_BS.device, precision):
            loss, parts = objective.loss(step, engine, part)
        engine.backward(loss)
        for name, value in {"total": loss.detach(), **parts}.items():
            found[name].append(value)
    engine.step(lr)
    return {name: float(sum(values)) / len(values) for name, values in found.items()}


@dataclass
class Progress:
    """Where a training stands: what a training state keeps beside weights and moments."""

    step: int = 0
    """Steps done."""
    sums: Dict[str, List[float]] = field(default_factory=dict)
    """Losses by name over the last steps so far."""

    @property
    def loss(self) -> Dict[str, float]:
        """Means of the losses by name."""
        return {name: sum(values) / len(values) for name, values in self.sums.items()}

    def note(self, found: Mapping[str, float], steps: int) -> None:
        """A step was taken, of `steps` in all."""
        if self.step >= steps - max(1, steps // LAST):
            for name, value in found.items():
                self.sums.setdefault(name, []).append(value)
        self.step += 1


def train(
    engine: Engine,
    objective: Objective,
    batches: Batches,
    schedule: Schedule,
    device: torch.device,
    *,
    precision: str = "fp32",
    place: Place = ALONE,
    progress: Optional[Progress] = None,
    average: Optional[WeightAverage] = None,
    after: Callable[[Progress, float], None] = lambda progress, loss: None,
) -> Progress:
    """Take the steps of a training that are not done yet.

    Args:
        progress: where an earlier attempt left off; None: nowhere.
        average: follows the weights.
        after: called after every step with the progress and the step's loss.
    """
    progress = progress or Progress()
    while progress.step < schedule.steps:
        step = progress.step
        batch = batches.batch(step, place).to(device)
        found = training_step(engine, objective, step, batch, schedule.lr(step), precision)
        progress.note(found, schedule.steps)
        if average is not None:
            average.after_step(engine, schedule.done + progress.step)
        after(progress, found["total"])
    end = schedule.done + schedule.steps
    if average is not None and schedule.steps and not average.falls_within(schedule.done, end):
        average.sample(engine)  # a training shorter than the distance of two samples counts too
    return progress
