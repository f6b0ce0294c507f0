"""Gradient descent with momentum, a value-less associative memory of past gradients (Eq. 33)."""

from __future__ import annotations

from typing import Any, List, Optional

import torch
from torch import nn
from torch.nn import Parameter

from nl_model.config import OptimizerConfig
from nl_model.optim.registry import register


class SGD(torch.optim.SGD):
    """Torch's SGD with decoupled weight decay: weights shrink by lr * decay per write, momentum knows nothing of it."""

    def __init__(self, parameters: List[Parameter], lr: float, momentum: float, decay: float) -> None:
        super().__init__(parameters, lr=lr, momentum=momentum)
        for group in self.param_groups:
            group["decay"] = decay

    def step(self, closure: Any = None) -> Any:
        """One write."""
        with torch.no_grad():
            for group in self.param_groups:
                written = [p for p in group["params"] if p.grad is not None]
                if group["decay"] and written:
                    torch._foreach_mul_(written, 1.0 - group["lr"] * group["decay"])
        return super().step(closure)


@register("sgd")
def build(parameters: List[Parameter], cfg: OptimizerConfig, model: Optional[nn.Module]) -> SGD:
    """SGD as a level configures it; beta1 is the momentum."""
    return SGD(parameters, cfg.lr, cfg.beta1, cfg.weight_decay)
