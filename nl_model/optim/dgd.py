"""Delta gradient descent: a layer's weights as a regression memory of the layer's inputs (Eq. 54 to 57).

Shapes: N samples, O outputs, I inputs of a layer; "..." a batch of layers.
"""

from __future__ import annotations

import weakref
from typing import Any, Callable, Dict, Iterable, List, Optional

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from nl_model.config import OptimizerConfig
from nl_model.optim.adamw import accumulator
from nl_model.optim.matrix import MatrixOptimizer
from nl_model.optim.registry import register


def dgd_step(weight_OI: Tensor, x_I: Tensor, u_grad_O: Tensor, lr: float) -> Tensor:
    """The exact rule for one sample: argmin_W 1/2 ||W x - u||^2 + 1/(2 lr) ||W - W_t||^2, with u = -u_grad (Eq. 56).

    W = W_t (I - lr' x x^T) - lr' u_grad x^T with lr' = lr / (1 + lr ||x||^2). Eq. 57 prints the case ||x|| = 1.

    Args:
        weight_OI: W_t (..., O, I).
        x_I: input of the layer (..., I).
        u_grad_O: gradient of the loss with respect to the layer's output (..., O).
        lr: step size of the gradient descent that the rule becomes where W_t x = 0 and x is short.

    Returns:
        The new weights (..., O, I).
    """
    rate = lr / (1 + lr * x_I.square().sum(-1))
    error_O = (weight_OI @ x_I.unsqueeze(-1)).squeeze(-1) + u_grad_O
    return weight_OI - rate[..., None, None] * (error_O.unsqueeze(-1) * x_I.unsqueeze(-2))


def dgd_direction(weight_OI: Tensor, grad_OI: Tensor, gram_II: Tensor, lr: float, erase: float = 1.0) -> Tensor:
    """The exact rule for N samples: W = W_t - lr * direction solves the proximal problem of the summed objective.

    With G = sum u_grad x^T, which is the weight gradient, and A = sum x x^T, setting the gradient of
    1/2 sum ||W x - u||^2 + 1/(2 lr) ||W - W_t||^2 to zero gives W = (W_t - lr G) (I + lr A)^-1, hence
    direction = (G + W_t A) (I + lr A)^-1. This reduction asks of N samples only what can be summed over a period at
    constant weights, G and A, whatever N is. It is stable for every lr, since the eigenvalues of I + lr A are at
    least 1; the explicit form W (I - lr' A) is not. For one sample it is `dgd_step` (Sherman-Morrison). For the mean
    objective pass the means of G and A.

    Args:
        weight_OI, grad_OI: (..., O, I).
        gram_II: A (..., I, I).
        lr: step size, at least 0.
        erase: factor on A; 0 is gradient descent.

    Returns:
        (..., O, I). Its relative error is about lr ||A|| times the precision: 1e-5 in float32 for lr ||A|| = 100.

    Raises:
        ValueError: where A is not finite, or lr ||A|| so large (1e7 in float32) that I is lost beside it.
    """
    identity = torch.eye(gram_II.size(-1), dtype=gram_II.dtype, device=gram_II.device)
    factor, failed = torch.linalg.cholesky_ex(identity + lr * erase * gram_II)
    if bool(failed.any()):
        raise ValueError(
            f"optimizer.name=dgd cannot solve for lr={lr}: lr times the inputs' second moment, of norm "
            f"{float(gram_II.norm()):.1e}, is beyond {gram_II.dtype} or not finite; use a smaller optimizer.lr or erase"
        )
    pull = grad_OI + erase * (weight_OI @ gram_II)
    return torch.cholesky_solve(pull.mT, factor).mT


class DGD(MatrixOptimizer):
    """Delta gradient descent for the nn.Linear layers of a model; every other parameter takes plain gradient descent.

    While it lives, it sees the inputs of its layers whenever a backward pass goes through them, and sums their Gram
    matrices, I x I per layer, next to the gradients; a forward pass without backward leaves no trace. A write uses up
    the sum, `zero_grad` forgets it. Inputs are those of this process: they are not reduced over ranks.

    It descends the loss plus 1/2 ||W x||^2, its layer's own response: erase = 1, the paper's rule, therefore fits a
    loss less tightly than plain gradient descent does.

    A clipped or otherwise scaled gradient scales the targets u, not the inputs.

    Args:
        parameters: what it writes.
        model: whose nn.Linear layers the matrices among them are, or belong to an nn.Embedding.
        lr: step size.
        reduction: mean if gradients are of the loss's mean over samples, sum if of its sum; Gram matrices follow.
        erase: strength of the erase term in [0, 1]; 0 is gradient descent.
        weight_decay: decoupled, per write.

    Raises:
        ValueError: for a matrix that is neither of an nn.Linear nor of an nn.Embedding.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        model: nn.Module,
        lr: float = 1e-2,
        reduction: str = "mean",
        erase: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        mine = list(parameters)
        wanted = {id(parameter) for parameter in mine}
        layers = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) in wanted]
        seen = {id(layer.weight) for layer in layers}
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        for parameter in mine:
            if parameter.ndim >= 2 and id(parameter) not in seen | tables:
                raise ValueError(
                    f"optimizer.name=dgd needs the inputs of layers, but a parameter of shape {tuple(parameter.shape)}"
                    " belongs to no nn.Linear of the model; write it with another optimizer, such as muon"
                )
        settings = {"lr": lr, "reduction": reduction, "erase": erase, "weight_decay": weight_decay}
        super().__init__(mine, settings, [p for p in mine if id(p) not in seen])
        handles = [layer.register_forward_hook(_observer(self, layer.weight)) for layer in layers]
        self.close: Callable[[], object] = weakref.finalize(self, _remove, handles)
        """Stop observing; a DGD that nobody holds any more does so by itself."""

    def observe(self, weight: Tensor, x: Tensor) -> None:
        """Add the inputs (..., I) of the layer with this weight to the sum."""
        x_NI = x.reshape(-1, x.size(-1)).to(accumulator(weight))
        state = self.state[weight]
        if "gram" not in state:
            state["gram"] = x_NI.new_zeros(x_NI.size(-1), x_NI.size(-1))
            state["samples"] = torch.zeros((), dtype=torch.int64, device=x_NI.device)
        with torch.autocast(x_NI.device.type, enabled=False):
            state["gram"].addmm_(x_NI.mT, x_NI)
        state["samples"] += x_NI.size(0)

    def direction(self, parameter: Tensor, gradient: Tensor, state: Dict[str, Any], group: Dict[str, Any]) -> Tensor:
        """`dgd_direction` of the period's samples; ValueError where none were seen."""
        if "gram" not in state:
            raise ValueError(
                f"optimizer.name=dgd has a gradient of a weight of shape {tuple(parameter.shape)} but saw no inputs of "
                "its layer; build the optimizer before the forward pass, call the nn.Linear itself rather than its "
                "weight, and run a backward pass between two writes"
            )
        gram_II, samples = state.pop("gram"), state.pop("samples")
        if group["reduction"] == "mean":
            gram_II = gram_II / samples
        return dgd_direction(parameter.to(gradient.dtype), gradient, gram_II, group["lr"], group["erase"])

    def write_other(self, parameter: Parameter, group: Dict[str, Any]) -> None:
        """Gradient descent, the same rule with the dot product as objective (Eq. 54 and 55)."""
        assert parameter.grad is not None, "a parameter without gradient is not written"
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(parameter.grad, alpha=-group["lr"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients and the inputs that belong to them."""
        super().zero_grad(set_to_none)
        self.state.clear()


def _observer(optimizer: DGD, weight: Tensor) -> Callable[[nn.Module, Any, Tensor], None]:
    """A forward hook that reports a layer's input to the optimizer once a backward pass reaches the layer's output."""
    owner = weakref.ref(optimizer)

    def on_forward(module: nn.Module, inputs: Any, output: Tensor) -> None:
        # A copy of the model has a weight of its own, and functional calls bring theirs: those are not ours to write.
        if module.weight is not weight or not weight.requires_grad or not output.requires_grad:
            return
        x = inputs[0].detach()

        def on_backward(_: Tensor) -> None:
            living = owner()
            if living is not None:
                living.observe(weight, x)

        output.register_hook(on_backward)

    return on_forward


def _remove(handles: List[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


@register("dgd")
def build(parameters: List[Parameter], cfg: OptimizerConfig, model: Optional[nn.Module]) -> DGD:
    """Delta gradient descent as a level configures it; ValueError without a model."""
    if model is None:
        raise ValueError(
            "optimizer.name=dgd sees the inputs of layers, so it works only where the model is at hand: not per "
            "sequence, not for the learned starts of nested wiring, not in sharded training; use another one here, "
            "such as adamw"
        )
    return DGD(parameters, model, cfg.lr, cfg.reduction, cfg.erase, cfg.weight_decay)
