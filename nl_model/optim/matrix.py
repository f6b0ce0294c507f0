"""What the optimizers of whole matrices share: the loop over parameters, weight decay, AdamW for everything else."""

from __future__ import annotations

import abc
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

import torch
from torch import Tensor
from torch.nn import Parameter

from nl_model.optim.adamw import accumulator, adamw_


class MatrixOptimizer(torch.optim.Optimizer, abc.ABC):
    """Writes W -= lr * direction, after decoupled weight decay.

    Args:
        parameters: what it writes. With two or more dimensions it is a matrix, or a batch of matrices in the last two;
            with fewer it goes to `write_other`, which is AdamW unless a subclass knows better.
        defaults: lr and weight_decay, betas, eps and adamw_scale of AdamW, and the subclass's own settings.
        others: parameters that go to `write_other` though they are matrices, such as embeddings.

    Moments are float32, or float64 where a parameter is. `group["step"]` counts the writes.
    """

    def __init__(
        self, parameters: Iterable[Parameter], defaults: Dict[str, Any], others: Iterable[Parameter] = ()
    ) -> None:
        apart = {id(parameter) for parameter in others}
        kinds: Dict[bool, List[Parameter]] = {True: [], False: []}
        for parameter in parameters:
            kinds[parameter.ndim >= 2 and id(parameter) not in apart].append(parameter)
        groups = [{"params": found, "matrix": kind} for kind, found in kinds.items() if found]
        super().__init__(groups, {"betas": (0.9, 0.95), "eps": 1e-8, "adamw_scale": 1.0, **defaults, "step": 0})

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], float]] = None) -> Optional[float]:  # type: ignore[override]
        """Write every parameter that has a gradient; ValueError for flat shards of matrices."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] += 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                (self.write_matrix if group["matrix"] else self.write_other)(parameter, group)
        return loss

    @abc.abstractmethod
    def direction(self, parameter: Tensor, gradient: Tensor, state: Dict[str, Any], group: Dict[str, Any]) -> Tensor:
        """What lr multiplies, of the gradient's shape (..., O, I), in the accumulators' precision.

        Args:
            parameter: the weights before the write.
            gradient: theirs, in the accumulators' precision; not to be changed.
            state: tensors by name, empty at first.
            group: the settings, and `step`, the number of this write from 1.
        """

    def write_matrix(self, parameter: Parameter, group: Dict[str, Any]) -> None:
        """Write a matrix that has a gradient."""
        if parameter.ndim < 2:
            raise ValueError(
                f"{type(self).__name__} was built for whole matrices but is asked to write a flat shard of "
                f"{parameter.numel()} numbers; use adamw or sgd where parameters are sharded (ZeRO)"
            )
        assert parameter.grad is not None, "a parameter without gradient is not written"
        gradient = parameter.grad.to(accumulator(parameter))
        direction = self.direction(parameter, gradient, self.state[parameter], group)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])

    def write_other(self, parameter: Parameter, group: Dict[str, Any]) -> None:
        """Write a parameter that is not a matrix."""
        betas: Tuple[float, float] = group["betas"]
        lr = group["lr"] * group["adamw_scale"]
        adamw_(parameter, self.state[parameter], lr, betas, group["eps"], group["weight_decay"])


def kept(state: Dict[str, Any], key: str, like: Tensor) -> Tensor:
    """A tensor of a state, zero at first."""
    if key not in state:
        state[key] = torch.zeros_like(like, memory_format=torch.contiguous_format)
    return state[key]
