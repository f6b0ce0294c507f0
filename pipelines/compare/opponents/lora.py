"""Low-rank adapters beside the linear maps of the blocks; at every mark they are merged and begin anew.

Hu et al., 2021 (arXiv 2106.09685), merged and restarted as ReLoRA does (Lialin et al., 2023, arXiv 2307.05695). Only
adapters train: x W^T + x A^T B^T, W at rest. Here W holds the sum at all times, so that whoever reads the model reads
all of it, and the adapter's own term is added with value zero and its gradient: (d - stop(d)) with d = x A^T B^T. FLOPs
are counted as those of the usual form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, Tuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from nl_model.checks import at_least
from nl_model.model import NestedLM
from pipelines.config.schema import Config
from pipelines.experience.replay import Experience
from pipelines.sleep.engine import LocalEngine
from pipelines.wake.hooks import HookCosts, NoHook


def linear_maps(model: NestedLM) -> Dict[str, nn.Linear]:
    """The linear maps of the blocks by name."""
    return {name: m for name, m in model.blocks.named_modules() if isinstance(m, nn.Linear)}


@dataclass
class Lora(NoHook):
    """The hook."""

    rank: int = 16
    """Of every adapter."""
    adapters: Dict[str, Tuple[Parameter, Parameter]] = field(default_factory=dict, init=False, repr=False)
    """A (rank, in) and B (out, rank) by map."""
    rests: Dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    """W by map, without its adapter."""

    def __post_init__(self) -> None:
        at_least("hook.rank", self.rank, 1)

    def costs(self, cfg: Config, vocab_size: int) -> HookCosts:
        """Resting weights want no gradient (the head's among them); adapters have two products forward, four back."""
        model = NestedLM(cfg.model, cfg.levels, vocab_size)
        shapes = [m.weight.shape for m in linear_maps(model).values()]
        spared = sum(2 * out * size for out, size in shapes) + 2 * model.head.weight.numel()
        return HookCosts(trained=float(sum(6 * self.rank * (out + size) for out, size in shapes) - spared))

    def attach(self, model: NestedLM, cfg: Config, experience: Callable[[], Experience]) -> float:
        """Put an adapter beside every map."""
        self.model, self.maps, self.starts, self.seed = model, linear_maps(model), 0, cfg.run.seed
        self.adapters, self.rests = {}, {}
        for name, module in self.maps.items():
            out, size = module.weight.shape
            a, b = torch.empty(self.rank, size), torch.zeros(out, self.rank)
            self.adapters[name] = (Parameter(a.to(module.weight)), Parameter(b.to(module.weight)))
            module.register_forward_hook(self._adapted(name))
        self._begin()
        return 0.0

    def _adapted(self, name: str) -> Callable[[nn.Module, Tuple[Any, ...], Tensor], Tensor]:
        def added(module: nn.Module, given: Tuple[Any, ...], out: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return out
            a, b = self.adapters[name]
            change = F.linear(F.linear(given[0], a), b)
            return out + (change - change.detach())

        return added

    @torch.no_grad()
    def _begin(self) -> None:
        """Fresh adapters, which change nothing yet, on the weights as they are."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.starts)
        self.starts += 1
        for name, (a, b) in self.adapters.items():
            a.copy_(torch.empty(a.shape).normal_(0.0, a.size(1) ** -0.5, generator=generator))
            b.zero_()
            self.rests[name] = self.maps[name].weight.detach().clone()

    def frozen(self) -> List[str]:
        """All of the model's own parameters."""
        return [name for name, _ in self.model.named_parameters()]

    def parameters(self) -> Mapping[str, Parameter]:
        """The adapters."""
        return {
            f"adapter/{n}/{side}": p for n, pair in self.adapters.items() for side, p in zip("ab", pair, strict=True)
        }

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Every map holds its sum again."""
        for name, (a, b) in self.adapters.items():
            self.maps[name].weight.copy_(self.rests[name] + b @ a)

    def boundary(self, engine: LocalEngine) -> float:
        """Merge: the sums are the new rests."""
        self._begin()
        engine.forget(self.parameters())
        return 0.0

    def state(self) -> Dict[str, Tensor]:
        """Adapters and rests."""
        found = {name: p.detach() for name, p in self.parameters().items()}
        found.update({f"rest/{name}": t for name, t in self.rests.items()})
        return {**found, "starts": torch.tensor(self.starts)}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take them over."""
        for name, parameter in self.parameters().items():
            parameter.copy_(tensors[name])
        for name, rest in self.rests.items():
            rest.copy_(tensors[f"rest/{name}"])
        self.starts = int(tensors["starts"])
