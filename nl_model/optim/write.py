"""One write: gradients are clipped, an optimizer steps, gradients are cleared. Everything that trains writes here."""

from __future__ import annotations

from typing import Iterable, Optional

import torch
from torch.nn import Parameter


def write_gradients(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Parameter], clip: float = 0.0, lr: Optional[float] = None
) -> None:
    """Apply the gradients that parameters hold, once, and clear them.

    Args:
        optimizer: over these parameters.
        parameters: what is written; their norm is taken together.
        clip: largest norm of all gradients together; 0: none.
        lr: step size of all of the optimizer's groups; None: as they are.
    """
    if clip:
        torch.nn.utils.clip_grad_norm_(list(parameters), clip)
    if lr is not None:
        for group in optimizer.param_groups:
            group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
