"""Muon: momentum, orthogonalised by Newton-Schulz iterations (Eq. 42; Jordan et al., 2024).

Shapes: O outputs, I inputs of a matrix; "..." a batch of matrices.
"""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Optional, Self, Tuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from nl_model.config import OptimizerConfig
from nl_model.optim.matrix import MatrixOptimizer, kept
from nl_model.optim.registry import matrix_settings, register

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Odd polynomial that drives singular values in (0, 1] to about 1, fast rather than exactly."""


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix, roughly: same singular vectors, singular values in 0.68 to 1.21.

    Args:
        x: matrices (..., O, I), any floating dtype, in which it computes. Its scale does not matter; zero stays zero.
        steps: iterations of the quintic. Five bring singular values down to 1/200 of the norm into that range, which
            is the quintic's image of itself: its local minimum is 0.682, its local maximum 1.202.
    """
    a, b, c = QUINTIC
    wide = x.mT if x.size(-2) > x.size(-1) else x  # the smaller Gram matrix
    tiny = torch.finfo(x.dtype).tiny
    # By the largest entry first: squares of very small gradients would underflow in the norm.
    y = wide / wide.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
    y = y / torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True).clamp_min(tiny)
    for _ in range(steps):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.mT if x.size(-2) > x.size(-1) else y


def shape_scale(x: Tensor) -> float:
    """sqrt(max(1, O / I)): keeps the step of a tall matrix as large per output as that of a square one."""
    return max(1.0, x.size(-2) / x.size(-1)) ** 0.5


class Muon(MatrixOptimizer):
    """m = momentum * m + g; W -= lr * sqrt(max(1, O / I)) * NewtonSchulz(m). Invariant to the gradient's scale.

    Args:
        parameters: what it writes; vectors go to AdamW.
        lr: step size, the spectral norm of a square matrix's step.
        momentum: decay of m per write.
        nesterov: orthogonalise g + momentum * m instead.
        ns_steps: Newton-Schulz iterations.
        weight_decay: decoupled, per write.
        others: matrices that go to AdamW as well.
        betas, eps: AdamW's.
        adamw_scale: AdamW's step size in multiples of lr.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = False,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
        others: Iterable[Parameter] = (),
        betas: Tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        adamw_scale: float = 0.1,
    ) -> None:
        settings = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        adamw = {"betas": betas, "eps": eps, "adamw_scale": adamw_scale}
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, **settings, **adamw}, others)

    def direction(self, parameter: Tensor, gradient: Tensor, state: Dict[str, Any], group: Dict[str, Any]) -> Tensor:
        """The orthogonalised momentum, scaled by shape."""
        return self.orthogonal(self.ahead(gradient, state, group), group)

    def ahead(self, gradient: Tensor, state: Dict[str, Any], group: Dict[str, Any]) -> Tensor:
        """Take the gradient into the momentum; what to orthogonalise then. Number by number, so any shape will do."""
        momentum = kept(state, "momentum", gradient).mul_(group["momentum"]).add_(gradient)
        return gradient.add(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum

    def orthogonal(self, matrix: Tensor, group: Dict[str, Any]) -> Tensor:
        """The direction that a whole matrix (..., O, I) gives."""
        return shape_scale(matrix) * newton_schulz(matrix, group["ns_steps"])

    @classmethod
    def configured(cls, parameters: List[Parameter], cfg: OptimizerConfig, model: Optional[nn.Module]) -> Self:
        """As a level configures it; beta1 is the momentum."""
        return cls(parameters, momentum=cfg.beta1, nesterov=cfg.nesterov, **matrix_settings(cfg, model))


@register("muon")
def build(parameters: List[Parameter], cfg: OptimizerConfig, model: Optional[nn.Module]) -> Muon:
    """Muon as a level configures it."""
    return Muon.configured(parameters, cfg, model)
