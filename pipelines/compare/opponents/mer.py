"""Meta-experience replay: after some steps the weights go back most of the way they came (Reptile's outer step).

Riemer et al., 2019 (arXiv 1810.11910), over Nichol et al., 2018 (arXiv 1803.02999). Every `every` steps the outer
weights move by `step` towards the trained ones, and training goes on from there. With replay in the batches this
favours gradients that agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Dict, Mapping

import torch
from torch import Tensor

from nl_model.checks import at_least, share
from nl_model.model import NestedLM
from pipelines.config.schema import Config
from pipelines.experience.replay import Experience
from pipelines.wake.hooks import NoHook


@dataclass
class Mer(NoHook):
    """The hook."""

    step: float = 0.7
    """Share of the way that the outer weights go."""
    every: int = 16
    """Steps between two outer ones."""

    def __post_init__(self) -> None:
        share("hook.step", self.step)
        at_least("hook.every", self.every, 1)

    def attach(self, model: NestedLM, cfg: Config, experience: Callable[[], Experience]) -> float:
        """The outer weights are those of the base."""
        self.model = model
        self.outer = {name: p.detach().clone() for name, p in model.named_parameters()}
        return 0.0

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """An outer step where one is due."""
        if step % self.every:
            return
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.outer[name].lerp_(parameter, self.step))

    def state(self) -> Dict[str, Tensor]:
        """The outer weights."""
        return dict(self.outer)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take them over."""
        for name, outer in self.outer.items():
            outer.copy_(tensors[name])
