"""How step size and guides' weights run over the steps of a training: pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipelines.config.sleep import SleepConfig


def learning_rate(peak: float, step: int, steps: int, warmup: float = 0.1, floor: float = 0.05) -> float:
    """Step size of step 0 .. steps - 1: linear warm-up, then a cosine down to floor * peak."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return peak * (step + 1) / ramp
    progress = (step - ramp) / max(1, steps - ramp)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Schedule:
    """Step size over the steps of one training.

    A cosine has to know where it ends. A stream's end nobody knows, so a cosine spans a round; a constant step size
    spans rounds, and what is released is cooled by averaging weights (warmup-stable-merge, arXiv 2507.17634).
    """

    kind: str
    """cosine: over this training. constant: after one warm-up, for ever."""
    peak: float
    """Largest step size."""
    steps: int
    """Steps of this training."""
    done: int = 0
    """Steps that the trainer had taken before this training."""
    warmup: int = 20
    """Steps of the warm-up of a constant step size, over the trainer's life."""

    @classmethod
    def of_round(cls, cfg: SleepConfig, steps: int, done: int) -> Schedule:
        """The schedule of a round of so many steps, by a trainer that took `done` steps in rounds before."""
        return cls(cfg.schedule, cfg.optimizer.lr, steps, done, cfg.warmup)

    def lr(self, step: int) -> float:
        """Step size of step 0 .. steps - 1 of this training."""
        if self.kind == "cosine":
            return learning_rate(self.peak, step, self.steps)
        return self.peak * min(1.0, (self.done + step + 1) / max(1, self.warmup))


def mixing(kind: str, step: int, steps: int) -> float:
    """Factor of the guides' weights at step 0 .. steps - 1: 1, or from 1 down to 0, straight or by a cosine."""
    done = step / max(1, steps - 1)
    if kind == "constant":
        return 1.0
    return 1.0 - done if kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
