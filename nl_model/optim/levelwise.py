"""One optimizer per level: gradients are summed over a level's period at constant weights, then applied once.

A parameter's `.grad` is the accumulator: backward passes add to it, only a write reads and clears it.
"""

from __future__ import annotations

from typing import Dict, List, Mapping, Optional

import torch
from torch import Tensor

from nl_model.levelled import Levelled
from nl_model.optim.registry import build_optimizer
from nl_model.optim.write import write_gradients

__all__ = ["LevelOptimizers", "build_optimizer", "set_steps", "steps_of"]


def steps_of(optimizer: torch.optim.Optimizer) -> Optional[Tensor]:
    """Steps that an optimizer counts by parameter group, int64 (groups,); None where it counts none."""
    groups = optimizer.param_groups
    return torch.tensor([group["step"] for group in groups]) if "step" in groups[0] else None


def set_steps(optimizer: torch.optim.Optimizer, steps: Optional[Tensor]) -> None:
    """Go on from what `steps_of` returned; None begins at 0, where the optimizer counts."""
    for i, group in enumerate(optimizer.param_groups):
        if "step" in group:
            group["step"] = 0 if steps is None else int(steps[i])


class LevelOptimizers:
    """The optimizers, gradient sums and write counters of some levels of a model.

    Args:
        model: whose parameters are written; gradients must be of the loss *summed* over tokens.
        names: the levels that this process writes, fastest first.
    """

    def __init__(self, model: Levelled, names: List[str]) -> None:
        self.parameters = {name: model.parameters_of(name) for name in names}
        self.configs = {name: model.level_configs[name].optimizer for name in names}
        self.optimizers = {
            name: build_optimizer(self.parameters[name].values(), self.configs[name], model) for name in names
        }
        self.tokens = {name: 0 for name in names}
        """Tokens in the gradient sum of each level."""
        self.writes = {name: 0 for name in names}
        """Writes of each level so far."""

    def count(self, tokens: int) -> None:
        """Note that a backward pass over `tokens` tokens was added to every level's gradient sum."""
        for name in self.tokens:
            self.tokens[name] += tokens

    def write(self, name: str) -> None:
        """Apply a level's gradient sum once and clear it (Eq. 71, with exactly the tokens of the period)."""
        assert self.tokens[name] > 0, f"level {name} is due but saw no token"
        cfg, parameters = self.configs[name], list(self.parameters[name].values())
        if cfg.reduction == "mean":
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self.tokens[name])
        write_gradients(self.optimizers[name], parameters, cfg.clip)
        self.tokens[name] = 0
        self.writes[name] += 1

    def discard(self, name: str) -> None:
        """Forget a level's gradient sum."""
        self.optimizers[name].zero_grad(set_to_none=True)
        self.tokens[name] = 0

    def restart(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Send a level back to given weights, its moments forgotten (nested wiring)."""
        with torch.no_grad():
            for key, parameter in self.parameters[name].items():
                parameter.copy_(weights[key])
                self.optimizers[name].state.pop(parameter, None)
        set_steps(self.optimizers[name], None)

    def state(self) -> Dict[str, Tensor]:
        """Gradient sums, moments and counters as flat named tensors; a round trip is exact to the bit.

        The tensors are the live ones: write or copy them before the next step.
        """
        flat: Dict[str, Tensor] = {}
        for level, parameters in self.parameters.items():
            flat[f"counter/{level}"] = torch.tensor([self.tokens[level], self.writes[level]])
            if (steps := steps_of(self.optimizers[level])) is not None:
                flat[f"step/{level}"] = steps
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    flat[f"grad/{name}"] = parameter.grad.detach()
                for key, value in self.optimizers[level].state.get(parameter, {}).items():
                    if value is not None:
                        flat[f"moment/{key}/{name}"] = torch.as_tensor(value).detach()
        return flat

    def load_state(self, flat: Dict[str, Tensor]) -> None:
        """Take over what `state` returned."""
        moments: Dict[str, Dict[str, Tensor]] = {}
        for key, value in flat.items():
            if key.startswith("moment/"):
                _, kind, name = key.split("/", 2)
                moments.setdefault(name, {})[kind] = value
        for level, parameters in self.parameters.items():
            self.tokens[level], self.writes[level] = (int(v) for v in flat[f"counter/{level}"])
            optimizer = self.optimizers[level]
            set_steps(optimizer, flat.get(f"step/{level}"))
            for name, parameter in parameters.items():
                gradient = flat.get(f"grad/{name}")
                parameter.grad = None if gradient is None else gradient.to(parameter.device).clone()
                optimizer.state.pop(parameter, None)
                if name in moments:
                    # The step counter stays a float32 tensor on the parameter's device: the fused kernel asks for it.
                    optimizer.state[parameter] = {k: v.to(parameter.device).clone() for k, v in moments[name].items()}
