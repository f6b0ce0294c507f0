"""The nested wiring: each level learns the start of the next faster one, which returns to it (Eq. 72)."""

from __future__ import annotations

import itertools
from typing import Dict, List, Mapping

import torch
from torch import Tensor, nn

from nl_model.levelled import Levelled
from nl_model.optim.levelwise import LevelOptimizers, build_optimizer, set_steps, steps_of


class NestedStarts:
    """Learned starts of all levels but the slowest.

    The gradients that a level sees during one period of the next slower level, each at the weights of its moment, are
    summed; when the slower level writes, its optimizer writes the start with that sum (the first-order meta-gradient),
    and the faster level begins anew there, its moments forgotten.
    """

    def __init__(self, model: Levelled, names: List[str]) -> None:
        self.slower = dict(itertools.pairwise(names))
        """The next slower level of each."""
        self.starts: Dict[str, Dict[str, nn.Parameter]] = {}
        self.optimizers: Dict[str, torch.optim.Optimizer] = {}
        self.tokens = {name: 0 for name in self.slower}
        self.configs = {name: model.level_configs[slower].optimizer for name, slower in self.slower.items()}
        for name in self.slower:
            weights = model.parameters_of(name)
            self.starts[name] = {key: nn.Parameter(p.detach().clone()) for key, p in weights.items()}
            self.optimizers[name] = build_optimizer(list(self.starts[name].values()), self.configs[name])

    def collect(self, name: str, optimizers: LevelOptimizers) -> None:
        """Add the gradient sum of a level that is about to be written to its start's."""
        if name not in self.starts:
            return
        self.tokens[name] += optimizers.tokens[name]
        for key, parameter in optimizers.parameters[name].items():
            start = self.starts[name][key]
            if parameter.grad is not None:
                start.grad = parameter.grad.clone() if start.grad is None else start.grad + parameter.grad

    def period_ended(self, name: str, optimizers: LevelOptimizers) -> None:
        """After a level was written: write the start of the next faster one, and send that one back to it."""
        for faster in (f for f, slower in self.slower.items() if slower == name):
            cfg, start = self.configs[faster], list(self.starts[faster].values())
            if not self.tokens[faster]:
                continue  # nothing was learned since it last began
            if cfg.reduction == "mean":
                for parameter in start:
                    if parameter.grad is not None:
                        parameter.grad.div_(self.tokens[faster])
            if cfg.clip:
                nn.utils.clip_grad_norm_(start, cfg.clip)
            self.optimizers[faster].step()
            self.optimizers[faster].zero_grad(set_to_none=True)
            self.tokens[faster] = 0
            optimizers.restart(faster, self.starts[faster])

    def shift(self, delta: Mapping[str, Tensor]) -> None:
        """Move the starts along with weights that are moved from outside (rebasing at an adoption)."""
        with torch.no_grad():
            for starts in self.starts.values():
                for key, start in starts.items():
                    start.add_(delta[key])

    def state(self) -> Dict[str, Tensor]:
        """Starts, their gradient sums and moments as flat named tensors."""
        flat: Dict[str, Tensor] = {}
        for level, starts in self.starts.items():
            flat[f"start_tokens/{level}"] = torch.tensor(self.tokens[level])
            if (steps := steps_of(self.optimizers[level])) is not None:
                flat[f"start_step/{level}"] = steps
            for key, start in starts.items():
                flat[f"start/{key}"] = start.detach().clone()
                if start.grad is not None:
                    flat[f"start_grad/{key}"] = start.grad.clone()
                for kind, value in self.optimizers[level].state.get(start, {}).items():
                    flat[f"start_moment/{kind}/{key}"] = torch.as_tensor(value).clone()
        return flat

    def load_state(self, flat: Dict[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for level, starts in self.starts.items():
            self.tokens[level] = int(flat[f"start_tokens/{level}"])
            set_steps(self.optimizers[level], flat.get(f"start_step/{level}"))
            for key, start in starts.items():
                start.data.copy_(flat[f"start/{key}"])
                gradient = flat.get(f"start_grad/{key}")
                start.grad = None if gradient is None else gradient.to(start.device).clone()
                moments = {
                    k.split("/")[1]: v
                    for k, v in flat.items()
                    if k.startswith("start_moment/") and k.split("/", 2)[2] == key
                }
                self.optimizers[level].state.pop(start, None)
                if moments:
                    self.optimizers[level].state[start] = {k: v.to(start.device).clone() for k, v in moments.items()}
