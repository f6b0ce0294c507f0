"""Learning without forgetting: what the model of the last mark would have said counts beside the truth.

Li & Hoiem, 2016 (arXiv 1606.09282). The loss of every token that is trained on becomes (1 - weight) nll + weight KL(old
|| new), old being a copy of the model as it was at the last mark, at first the base.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Callable, Dict, Mapping

import torch
from torch import Tensor

from nl_model.checks import share
from nl_model.distillation import distillation, forward_kl
from nl_model.flops import forward_flops
from nl_model.model import NestedLM
from nl_model.weights import load_into
from pipelines.config.schema import Config
from pipelines.experience.replay import Experience
from pipelines.sleep.engine import LocalEngine
from pipelines.sleep.training import Batch
from pipelines.wake.hooks import HookCosts, NoHook


@dataclass
class Lwf(NoHook):
    """The hook."""

    weight: float = 0.3
    """Share of the old model's distribution in the loss."""

    def __post_init__(self) -> None:
        share("hook.weight", self.weight)

    def costs(self, cfg: Config, vocab_size: int) -> HookCosts:
        """The old model reads all that is trained on."""
        return HookCosts(trained=float(forward_flops(cfg.model, cfg.levels, vocab_size)))

    def attach(self, model: NestedLM, cfg: Config, experience: Callable[[], Experience]) -> float:
        """The base is the first model that shall not be forgotten."""
        self.model, self.old = model, copy.deepcopy(model).requires_grad_(False)
        return 0.0

    def loss(self, nll_BT: Tensor, logits_BTV: Tensor, batch: Batch) -> Tensor:
        """Truth, and the old model."""
        with torch.no_grad():
            old_BTV = self.old(batch.tokens_BS[:, :-1])
        return distillation(nll_BT, forward_kl(logits_BTV, old_BTV), self.weight)

    def boundary(self, engine: LocalEngine) -> float:
        """From now on this is the old model."""
        load_into(self.old, dict(self.model.named_parameters()))
        return 0.0

    def state(self) -> Dict[str, Tensor]:
        """The old model's weights."""
        return {name: p.detach() for name, p in self.old.named_parameters()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take them over."""
        load_into(self.old, tensors)
