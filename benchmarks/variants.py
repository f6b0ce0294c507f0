"""Ways to spend a step on a nested model: awake, all levels, one fast state per sequence, forward alone.

Shapes: B batch, S sequence (T + 1), T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Optional, Tuple

import torch
from torch import Tensor, nn

from benchmarks.interleave import Variant
from nl_model.config import LevelConfig, ModelConfig, OptimizerConfig
from nl_model.model import NestedLM, autocast
from nl_model.online import OnlineLevels
from nl_model.streaming import StreamingModel

OPTIMIZER = OptimizerConfig(lr=3e-4)
Periods = Tuple[int, int, int]
"""Of the fast, the medium and the slow level."""
Change = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
"""What is done to the function that is measured: nothing, or torch.compile."""


@dataclass(frozen=True)
class Shape:
    """What is run, and on what."""

    dim: int = 256
    blocks: int = 4
    heads: int = 4
    vocabulary: int = 8192
    batch: int = 4
    context: int = 256
    device: str = "cpu"
    precision: str = "fp32"
    """fp32, or bf16 for matrix products under autocast."""

    @property
    def step_tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.context

    def draw(self) -> Tensor:
        """Fresh random sequences, int64 (B, S): what they say does not change what a step costs."""
        size = (self.batch, self.context + 1)
        return torch.randint(self.vocabulary, size, device=self.device)

    def autocast(self) -> AbstractContextManager[None]:
        """The context of a forward pass."""
        return autocast(torch.device(self.device), self.precision)


def as_it_is(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Without a compiler."""
    return function


def compile_once(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile for the one shape there is, on this thread alone."""
    import torch._inductor.config as inductor  # noqa: PLC0415 (takes seconds)

    inductor.compile_threads = 1
    return torch.compile(function, dynamic=False)


def size_of(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class NestedVariants:
    """Steps of NestedLMs of one shape and size.

    Slow sits in all blocks, fast and medium in the last one, each twice as wide as the model.
    """

    shape: Shape
    parameters: int
    """What every model has, to 1%; the width of slow is chosen so."""

    def model(self, periods: Periods, unit: str = "steps", mixer: str = "attention") -> NestedLM:
        """A model none of whose weights is zero, so that no gradient is."""
        model = self.build(self.slow_width(mixer), periods, unit, mixer).reset_parameters(seed=0)
        assert abs(size_of(model) / self.parameters - 1) < 0.01, f"{size_of(model)} beside {self.parameters} parameters"
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(0.0, 0.02)
        return model.to(self.shape.device)

    def slow_width(self, mixer: str) -> int:
        """Hidden units of slow in every block: three times the model's width, unless the sizes ask for others."""
        dim, blocks = self.shape.dim, self.shape.blocks
        with torch.device("meta"):
            off = self.parameters - size_of(self.build(3 * dim, (1, 1, 1), "steps", mixer))
        if abs(off) < 0.01 * self.parameters:
            return 3 * dim
        unit = max(1, dim // 16)  # matrix products like round sizes
        return 3 * dim + unit * round(off / (2 * dim * blocks * unit))

    def build(self, slow_width: int, periods: Periods, unit: str, mixer: str) -> NestedLM:
        """A model with weights as torch draws them."""
        shape, (fast, medium, slow) = self.shape, periods
        last = str(shape.blocks - 1)
        levels = {
            "fast": LevelConfig(fast, unit, 2 * shape.dim, last, optimizer=OPTIMIZER),
            "medium": LevelConfig(medium, unit, 2 * shape.dim, last, optimizer=OPTIMIZER),
            "slow": LevelConfig(slow, unit, slow_width, "all", owner="pool", optimizer=OPTIMIZER),
        }
        cfg = ModelConfig(shape.dim, shape.blocks, shape.heads, shape.context, mixer)
        return NestedLM(cfg, levels, shape.vocabulary)

    def levels(
        self,
        periods: Periods,
        learned: Optional[Tuple[str, ...]] = None,
        steps: int = 2,
        mixer: str = "attention",
        change: Change = as_it_is,
    ) -> Variant:
        """Levels shared by the batch, periods in steps; a visit ends on a boundary of the slowest one written."""
        shape, model = self.shape, self.model(periods, mixer=mixer)
        levels = OnlineLevels(model, learned, shape.step_tokens)
        loss = change(model.nll)
        slowest = max(levels.clock.periods.values())

        def begin() -> None:
            levels.tokens = max(0, slowest - steps * shape.step_tokens)

        def step() -> None:
            with shape.autocast():
                nll_BT = loss(shape.draw())
            levels.observe(nll_BT)
            levels.advance(shape.step_tokens)

        return Variant(step, shape.step_tokens, steps, begin, size_of(model))

    def full(self, mixer: str = "attention") -> Variant:
        """Every parameter trained in every step."""
        return self.levels((1, 1, 1), mixer=mixer)

    def wake(self, change: Change = as_it_is) -> Variant:
        """Only what the learner owns is written."""
        return self.levels((1, 2, 256), ("fast", "medium"), change=change)

    def sequences(self, chunk: int = 64) -> Variant:
        """Every sequence starts at the shared weights and writes fast levels of its own."""
        shape = self.shape
        model = self.model((chunk, shape.context, 4 * shape.context), unit="tokens").requires_grad_(False)
        stream = StreamingModel(model, shape.batch)

        def step() -> None:
            stream.reset()
            with shape.autocast():
                stream.feed(shape.draw())  # one token more than is learned from: the last target

        return Variant(step, shape.step_tokens, parameters=size_of(model))

    def forward(self, change: Change = as_it_is) -> Variant:
        """Logits of a model at rest."""
        shape, model = self.shape, self.model((1, 2, 256)).requires_grad_(False)
        forward = change(model.forward)

        def step() -> None:
            with shape.autocast(), torch.no_grad():
                forward(shape.draw()[:, :-1])

        return Variant(step, shape.step_tokens, parameters=size_of(model))
