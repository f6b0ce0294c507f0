"""Value object of the self-modifying memories: their rule, depth and chunk sizes. Validated when built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

from nl_model.checks import at_least, must, one_of

OBJECTIVES = ("dot", "l2")
SIGNS = ("corrected", "literal")
FORGET = ("initial", "zero")


@dataclass(frozen=True)
class MemoryConfig:
    """Rule of the memories of self-modifying Titans (nested learning, Eq. 83-93).

    The default (dot, dgd) is the gated delta rule. `l2` with `dgd` is Eq. 93 to the letter: it erases twice and
    recalls half of what it was shown.
    """

    objective: str = "dot"
    """Inner loss of a write: dot, -<M(k), v>, or l2, ||M(k) - v||^2 / 2."""
    dgd: bool = True
    """Erase what the running memory holds at the key before each write (delta gradient descent, Eq. 57)."""
    factor: int = 1
    """Factor of the l2 gradient: 1, or 2 for the squared norm without the half (Eq. 88 to the letter)."""
    sign: str = "corrected"
    """corrected, or literal: Eq. 92 as printed, which stores minus the value (dot only)."""
    layers: int = 1
    """1: M(x) = W x. 2: M(x) = x + W1 silu(W2 x) (Eq. 89; eta and alpha have one output and no residual)."""
    expansion: int = 2
    """Hidden units of a two-layer memory per unit of head width."""
    chunk: int = 64
    """Tokens between two refreshes of keys, values, gates, targets and gradients. It is part of the model."""
    mem_chunk: int = 64
    """The same for the targets and gradients of the memory that answers queries (mem)."""
    decay: bool = True
    """Forgetting gate alpha per token and head; off: alpha = 1."""
    forget: str = "initial"
    """What alpha decays a memory to: its learned initial state, or zero (Eq. 88). The same at alpha = 1."""
    momentum: bool = False
    """Titans momentum on the writes, with one learned decay theta per head; gradients enter with 1 - theta, because
    otherwise self-made targets grow by 1 / (1 - theta) with every generation."""
    eta_max: float = 1.0
    """Upper bound of a step; without dgd, and with two layers, the steps of a chunk add up and it bounds their sum."""
    unit_values: bool = True
    """L2-normalise v like q and k; off (the paper) lets the memory of values amplify itself."""
    conv: int = 4
    """Width of the causal depthwise convolution on the inputs; 1 switches it off."""
    mix: bool = True
    """Static projection before the memories, so that every head sees the whole token; off: head h sees slice h."""

    def __post_init__(self) -> None:
        for key, allowed in (("objective", OBJECTIVES), ("sign", SIGNS), ("forget", FORGET)):
            one_of(f"memory.{key}", getattr(self, key), allowed)
        must("memory.layers", self.layers, self.layers in (1, 2), "be 1 (linear) or 2")
        must("memory.factor", self.factor, self.factor in (1, 2), "be 1 or 2")
        for key in ("expansion", "chunk", "mem_chunk", "conv"):
            at_least(f"memory.{key}", getattr(self, key), 1)
        steps = "lie in (0, 2): larger steps overshoot without bound"
        must("memory.eta_max", self.eta_max, 0 < self.eta_max < 2, steps)
        if self.objective == "dot" and self.layers == 2 and self.eta_max > 0.1:
            raise ValueError(
                f"memory.eta_max={self.eta_max} is too large for memory.layers=2 with memory.objective=dot: that "
                "loss has no minimum and the memories explode; use at most 0.1, or objective=l2"
            )
        if self.objective == "dot" and self.factor != 1:
            raise ValueError(f"memory.factor={self.factor} belongs to objective=l2; use factor=1 with objective=dot")
        if self.objective == "l2" and self.sign != "corrected":
            raise ValueError("memory.sign=literal belongs to objective=dot (Eq. 92); use sign=corrected with l2")

    @property
    def generators(self) -> Tuple[str, ...]:
        """Memories that make keys, values and gates."""
        return ("k", "v", "eta", "alpha") if self.decay else ("k", "v", "eta")

    @property
    def boxes(self) -> Tuple[str, ...]:
        """All memories."""
        return (*self.generators, "mem")

    @property
    def gain(self) -> int:
        """Factor of the written value: the gradient's factor and sign."""
        return -1 if self.sign == "literal" else self.factor

    @property
    def largest_step(self) -> float:
        """Upper bound of eta."""
        erases = self.dgd and self.layers == 1  # the second layer of a deep memory never erases
        return self.eta_max if erases else self.eta_max / max(self.chunk, self.mem_chunk)
