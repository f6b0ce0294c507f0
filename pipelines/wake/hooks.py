"""Hooks: what somebody may add to online training without writing a training step of their own.

The learner that trains every level (wake.writes=all) asks its hook at fixed places. Opponents of a comparison are hooks
(pipelines/compare/opponents); a run has none. A hook knows no source boundaries and no end of the stream: what it has
to do now and then it does at marks, once in a period of the pool.

Shapes: B sequences, T predicted tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Dict, Mapping, Optional, Protocol

from torch import Tensor
from torch.nn import Parameter

from nl_model.model import NestedLM
from pipelines.config.schema import Config
from pipelines.experience.replay import Experience
from pipelines.sleep.engine import LocalEngine
from pipelines.sleep.training import Batch


@dataclass(frozen=True)
class HookCosts:
    """What a hook costs and saves, per token: the budget of a method counts it, so that all spend the same."""

    trained: float = 0.0
    """FLOPs per token trained on, beside a full training step's; negative where it spares some."""
    streamed: float = 0.0
    """FLOPs per token streamed: what is done at marks, spread over their period."""
    stored: float = 0.0
    """Bytes that are stored beside a token of text, which takes one."""


class Hook(Protocol):
    """What online training asks at fixed places. `NoHook` does nothing at all of them."""

    def costs(self, cfg: Config, vocab_size: int) -> HookCosts:
        """What it costs, for a budget that is drawn up before anything runs."""

    def attach(self, model: NestedLM, cfg: Config, experience: Callable[[], Experience]) -> float:
        """Begin anew with a model as it stands, before its engine is built; returns FLOPs spent.

        Args:
            experience: opens the newest version of the store.
        """

    def frozen(self) -> list[str]:
        """Names of the model's parameters that the engine shall leave as they are."""

    def parameters(self) -> Mapping[str, Parameter]:
        """Parameters that train beside the model's, by names of their own."""

    def loss(self, nll_BT: Tensor, logits_BTV: Tensor, batch: Batch) -> Tensor:
        """Loss per token (B, T) in nats, with gradient, from that of the true tokens."""

    def penalty(self) -> Optional[Tensor]:
        """What is added to the mean loss of a pass, with gradient; None: nothing."""

    def scored(self, batch: Batch, logits_BTV: Tensor) -> None:
        """New text was read for the first time, before anything was learned from it; logits without gradient."""

    def after_step(self, step: int) -> None:
        """A step was written; `step`: how many so far. May change weights in place."""

    def boundary(self, engine: LocalEngine) -> float:
        """A mark was pinned, once in a period; returns FLOPs spent. May change weights and moments in place."""

    def state(self) -> Dict[str, Tensor]:
        """What a resume needs, by name."""

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""


class NoHook(Hook):
    """Nothing is added. Hooks derive from it and say what they do otherwise."""

    def costs(self, cfg: Config, vocab_size: int) -> HookCosts:
        """Nothing."""
        return HookCosts()

    def attach(self, model: NestedLM, cfg: Config, experience: Callable[[], Experience]) -> float:
        """Nothing to keep."""
        return 0.0

    def frozen(self) -> list[str]:
        """Everything trains."""
        return []

    def parameters(self) -> Mapping[str, Parameter]:
        """None."""
        return {}

    def loss(self, nll_BT: Tensor, logits_BTV: Tensor, batch: Batch) -> Tensor:
        """That of the true tokens."""
        return nll_BT

    def penalty(self) -> Optional[Tensor]:
        """Nothing."""
        return None

    def scored(self, batch: Batch, logits_BTV: Tensor) -> None:
        """Nothing to keep."""

    def after_step(self, step: int) -> None:
        """Nothing to do."""

    def boundary(self, engine: LocalEngine) -> float:
        """Nothing to do."""
        return 0.0

    def state(self) -> Dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""
