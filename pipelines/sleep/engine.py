"""What trains a model: the protocol that a training step is written against, and its implementation in one process.

The pool's implementation, over DeepSpeed, is cluster/pool/engine.py. Both clip and write with the same torch calls
where nothing is sharded, so that one rank without ZeRO and one process compute the same bits.

Shapes: B sequences, T predicted tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, Iterable, Iterator, List, Mapping, Optional, Protocol, Tuple

import torch
from torch import Tensor
from torch.nn import Parameter

from nl_model.config import OptimizerConfig
from nl_model.model import NestedLM
from nl_model.optim.moments import blank_state, counters_of, moments_in
from nl_model.optim.registry import build_optimizer
from nl_model.optim.write import write_gradients
from nl_model.weights import split


class TrainingState(Protocol):
    """Weights and moments of a training, whole tensors by name, whoever sharded them."""

    @property
    def counters(self) -> Mapping[str, float]:
        """The optimizer's own counters (Adam's `step`)."""

    def get(self, name: str) -> Optional[Tensor]:
        """One tensor, on the CPU; None where the state has none of that name."""

    def moments(self) -> List[str]:
        """Names of the moments (Adam: exp_avg and exp_avg_sq); not every parameter need have all of them."""

    def weights(self) -> Dict[str, Tensor]:
        """All weights by parameter name; empty where only moments were kept."""


class Steps(Protocol):
    """What a training step asks of an engine: forward, backward pass by pass, then one write."""

    passes: int
    """Passes that make one step; every one hands its loss to `backward`."""

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V), with gradient."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one pass; a step's gradient is that of the mean over its passes."""

    def step(self, lr: float) -> None:
        """After the last pass: average over ranks, clip, write with step size `lr`, clear."""


class Engine(Steps, Protocol):
    """Trains one model, and says what became of it."""

    def weights(self) -> Iterator[Tuple[str, Tensor]]:
        """Whole float32 parameters by name, on the CPU. A collective."""

    def state(self, weights: bool = True) -> Iterator[Tuple[str, Tensor]]:
        """`weight/NAME` (if wanted) and `MOMENT/NAME`, whole, float32, on the CPU. A collective."""

    def counters(self) -> Dict[str, float]:
        """The optimizer's own counters, which are the same for all parameters that have them."""

    def optimizer_bytes(self) -> int:
        """Bytes of optimizer state that this rank holds."""

    def close(self) -> None:
        """Free what the engine holds."""


@dataclass(frozen=True)
class HeldState:
    """A training state in memory: what a training state on disk holds, for runs in one process."""

    tensors: Dict[str, Tensor] = field(repr=False)
    """`weight/PARAMETER` and `MOMENT/PARAMETER`, float32."""
    counters: Dict[str, float] = field(default_factory=dict)
    """The optimizer's own counters."""

    @classmethod
    def of(cls, engine: Engine, weights: bool = True) -> HeldState:
        """The state of an engine between two steps."""
        return cls(dict(engine.state(weights)), engine.counters())

    def get(self, name: str) -> Optional[Tensor]:
        """One tensor; None where there is none of that name."""
        return self.tensors.get(name)

    def moments(self) -> List[str]:
        """Names of the moments."""
        return sorted({name.partition("/")[0] for name in self.tensors} - {"weight"})

    def weights(self) -> Dict[str, Tensor]:
        """All weights by parameter name."""
        return split(self.tensors, "weight")


class LocalEngine:
    """Trains a model in this process.

    Args:
        model: float32, on its device.
        optimizer: the optimizer's settings; its `lr` is handed to every `step`.
        passes: passes per step.
        frozen: names of parameters to leave as they are.
        state: what to take the moments from; its weights are the caller's to load into the model.
        extra: parameters that train beside the model's, by names of their own; they are no weights of the model.
    """

    def __init__(
        self,
        model: NestedLM,
        optimizer: OptimizerConfig,
        passes: int = 1,
        frozen: Iterable[str] = (),
        state: Optional[TrainingState] = None,
        extra: Optional[Mapping[str, Parameter]] = None,
    ) -> None:
        kept = set(frozen)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in kept)
        self.model, self.clip, self.passes = model, optimizer.clip, passes
        self.trained = {**{n: p for n, p in model.named_parameters() if p.requires_grad}, **(extra or {})}
        self.optimizer = build_optimizer(list(self.trained.values()), optimizer, model)
        if state is not None:
            self.load_moments(state)

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        logits_BTV: Tensor = self.model(tokens_BT)
        return logits_BTV

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one pass."""
        (loss / self.passes if self.passes > 1 else loss).backward()

    def step(self, lr: float) -> None:
        """Clip, write with step size `lr`, clear."""
        write_gradients(self.optimizer, self.trained.values(), self.clip, lr)

    def weights(self) -> Iterator[Tuple[str, Tensor]]:
        """Whole float32 parameters by name."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach().cpu().clone()

    def state(self, weights: bool = True) -> Iterator[Tuple[str, Tensor]]:
        """`weight/NAME` (if wanted) and `MOMENT/NAME`."""
        if weights:
            yield from ((f"weight/{name}", tensor) for name, tensor in self.weights())
        for name, parameter in self.trained.items():
            held = self.optimizer.state.get(parameter, {})
            for moment in moments_in(held):
                yield f"{moment}/{name}", held[moment].detach().cpu().clone()

    def counters(self) -> Dict[str, float]:
        """The optimizer's own counters."""
        return counters_of(self.optimizer)

    def optimizer_bytes(self) -> int:
        """Bytes of optimizer state."""
        tensors = (v for s in self.optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim())
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def close(self) -> None:
        """Nothing to free."""

    def forget(self, names: Iterable[str]) -> None:
        """Let parameters begin anew, without moments."""
        for name in names:
            self.optimizer.state.pop(self.trained[name], None)

    def load_moments(self, state: TrainingState) -> None:
        """Parameters that the state knows nothing of start with no moments.

        What is taken over is copied: optimizers write in place, and whoever keeps the state may load it again.
        """
        moments, names = state.moments(), {parameter: name for name, parameter in self.trained.items()}
        places = [(group, parameter) for group in self.optimizer.param_groups for parameter in group["params"]]
        for group, parameter in places:
            held = blank_state(group, parameter, moments, state.counters)
            for moment in moments_in(held):
                whole = state.get(f"{moment}/{names[parameter]}")
                if whole is not None:
                    held[moment].copy_(whole)
            if held:
                self.optimizer.state[parameter] = held
