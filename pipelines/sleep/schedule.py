"""How step size and guides' weights run over the steps of a training: pure functions of the step."""

from __future__ import annotations

import math


def learning_rate(peak: float, step: int, steps: int, warmup: float = 0.1, floor: float = 0.05) -> float:
    """Step size of step 0 .. steps - 1: linear warm-up, then a cosine down to floor * peak."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return peak * (step + 1) / ramp
    progress = (step - ramp) / max(1, steps - ramp)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def mixing(kind: str, step: int, steps: int) -> float:
    """Factor of the guides' weights at step 0 .. steps - 1: 1, or from 1 down to 0, straight or by a cosine."""
    done = step / max(1, steps - 1)
    if kind == "constant":
        return 1.0
    return 1.0 - done if kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
