"""What is released of a trainer that never cools down: a running average of its weights.

Merging the checkpoints of a training at a constant step size does what lowering the step size would do (WSM, arXiv
2507.17634), at any moment and without knowing the end. The last release is the average so far, so nothing else has to
be kept: a release's weights are where the next round's average goes on.
"""

from __future__ import annotations

import math
from typing import Dict, Mapping

from torch import Tensor

from pipelines.sleep.engine import Engine


class WeightAverage:
    """Exponential average of an engine's weights, sampled every few steps.

    Args:
        start: the average so far by parameter name, float32 on the CPU: the last release's weights.
        horizon: steps after which a weight counts 1 / e.
        every: steps between two samples; each gathers the weights once.
    """

    def __init__(self, start: Mapping[str, Tensor], horizon: int, every: int) -> None:
        assert horizon >= 1 and every >= 1, "checked where the configuration is built"
        self.weights: Dict[str, Tensor] = {
            name: tensor.detach().cpu().float().clone() for name, tensor in start.items()
        }
        self.every, self.share = every, 1.0 - math.exp(-every / horizon)
        self.samples = 0
        """Samples that were taken."""

    def falls_within(self, first: int, last: int) -> bool:
        """Whether a sample is due after any of the steps first + 1 .. last, counted over the trainer's life."""
        return last // self.every > first // self.every

    def after_step(self, engine: Engine, step: int) -> None:
        """Take a sample where one is due. A collective: every rank must call it.

        Args:
            step: steps that the trainer has taken in its life.
        """
        if not step % self.every:
            self.sample(engine)

    def sample(self, engine: Engine) -> None:
        """Move towards the present weights. A collective."""
        self.samples += 1
        for name, weight in engine.weights():
            self.weights[name].lerp_(weight, self.share)
