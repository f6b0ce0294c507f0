"""Deep momentum gradient descent: momentum as a learned memory that is read at the gradient (DMGD, Eq. 50 to 52).

Shapes: O outputs, I inputs of a matrix; "..." a batch of matrices. Signs: the memory holds gradients, not steps.
"""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from nl_model.config import OptimizerConfig
from nl_model.optim.delta_momentum import delta_write_
from nl_model.optim.matrix import MatrixOptimizer, kept
from nl_model.optim.muon import newton_schulz, shape_scale
from nl_model.optim.registry import matrix_settings, register


def recall(outer_II: Tensor, inner_II: Tensor, key_OI: Tensor) -> Tensor:
    """m(u) = tanh(u + u inner^T) outer, row by row. Odd: a gradient of the other sign recalls the opposite step."""
    return torch.tanh(key_OI + key_OI @ inner_II.mT) @ outer_II


def memorise_(outer_II: Tensor, inner_II: Tensor, key_OI: Tensor, decay: float, erase: float) -> None:
    """One gradient step of size 1 on both layers, with decay, in place: m = decay * m - grad (Eq. 50).

    The objective, a mean over the rows u of the key: -<m(u), u> for erase = 0 (dot), 1/2 ||m(u) - u||^2 for
    erase = 1 (l2); between them the share of the l2 objective's own output is `erase`.
    """
    hidden = torch.tanh(key_OI + key_OI @ inner_II.mT)
    error_OI = (key_OI - erase * (hidden @ outer_II)) / key_OI.size(-2)
    hidden_error = (error_OI @ outer_II.mT) * (1 - hidden.square())
    outer_II.mul_(decay).add_(hidden.mT @ error_OI)
    inner_II.mul_(decay).add_(hidden_error.mT @ key_OI)


def unit_rows(gradient: Tensor) -> Tuple[Tensor, Tensor]:
    """The gradient with a mean squared row norm of 1, and by what (..., 1, 1) to multiply it to have it back."""
    tiny = torch.finfo(gradient.dtype).tiny
    largest = gradient.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
    norm = torch.linalg.vector_norm(gradient / largest, dim=(-2, -1), keepdim=True).clamp_min(tiny)
    size = norm / gradient.size(-2) ** 0.5
    return gradient / largest / size, largest * size


class DeepMomentum(MatrixOptimizer):
    """W -= lr * sigma(m(u)), u the gradient, read after it was memorised.

    memory "linear": a matrix m. Without a value its key is the identity, so that reading it gives m itself:
        dot is plain momentum (Eq. 33), l2 is delta momentum (Eq. 49). With Newton-Schulz as output, dot is Muon.
    memory "mlp": two layers of I x I, zero at first, read at the rows of u. What it recalls for a row is the past
        gradients whose rows were alike. The paper's target "1" says nothing of a descent direction, so the target is
        u itself. Rows are normalised; with output "identity" the step has the gradient's scale again.
        Its first dot step never ascends: <m(u), u> = 1^T (K * G) 1 / O, K and G positive semi-definite.

    Args:
        parameters: what it writes; vectors go to AdamW.
        lr: step size.
        momentum: decay of the memory per write.
        memory, objective, output: as above; objective dot or l2, output identity or newton_schulz.
        erase: for l2, the share of the objective's erase term, in [0, 1].
        ns_steps, weight_decay, others, betas, eps, adamw_scale: as in `Muon`.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float = 0.02,
        momentum: float = 0.9,
        memory: str = "mlp",
        objective: str = "l2",
        output: str = "newton_schulz",
        erase: float = 1.0,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
        others: Iterable[Parameter] = (),
        betas: Tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        adamw_scale: float = 0.1,
    ) -> None:
        erase = erase if objective == "l2" else 0.0
        settings = {"momentum": momentum, "memory": memory, "output": output, "erase": erase, "ns_steps": ns_steps}
        adamw = {"betas": betas, "eps": eps, "adamw_scale": adamw_scale}
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, **settings, **adamw}, others)

    def direction(self, parameter: Tensor, gradient: Tensor, state: Dict[str, Any], group: Dict[str, Any]) -> Tensor:
        """What the memory recalls, through the output function."""
        if group["memory"] == "linear":
            momentum = kept(state, "momentum", gradient)
            recalled = delta_write_(momentum, gradient, group["momentum"], group["erase"])
        else:
            key_OI, size = unit_rows(gradient)
            square = gradient.new_zeros(()).expand(*gradient.shape[:-2], gradient.size(-1), gradient.size(-1))
            outer_II, inner_II = kept(state, "outer", square), kept(state, "inner", square)
            memorise_(outer_II, inner_II, key_OI, group["momentum"], group["erase"])
            recalled = recall(outer_II, inner_II, key_OI) * size
        if group["output"] == "identity":
            return recalled
        return shape_scale(gradient) * newton_schulz(recalled, group["ns_steps"])


@register("deep_momentum")
def build(parameters: List[Parameter], cfg: OptimizerConfig, model: Optional[nn.Module]) -> DeepMomentum:
    """Deep momentum as a level configures it; beta1 is the decay of the memory."""
    return DeepMomentum(
        parameters,
        momentum=cfg.beta1,
        memory=cfg.memory,
        objective=cfg.objective,
        output=cfg.output,
        erase=cfg.erase,
        **matrix_settings(cfg, model),
    )
