"""NestedLM: a decoder whose MLPs belong to named levels with update periods of their own.

Shapes: B batch, T tokens, S sequence (T + 1), D model width, V vocabulary, K half a head's width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nl_model.attention import RotaryAttention, rotary_table
from nl_model.config import LevelConfig, ModelConfig, check_levels
from nl_model.levelled import Levelled
from nl_model.losses import token_nll
from nl_model.pointwise import rms_norm, squared_relu
from nl_model.stream_state import States

Weights = Mapping[str, Tensor]
"""Weights to use instead of the model's own, by parameter name: (out, in), or (B, out, in) for one per sequence."""


def linear(x_BTI: Tensor, weight: Tensor) -> Tensor:
    """x W^T for one weight (O, I), or for one of every sequence (B, O, I)."""
    return F.linear(x_BTI, weight) if weight.dim() == 2 else torch.bmm(x_BTI, weight.to(x_BTI.dtype).mT)


class LevelMLP(nn.Module):
    """One level's MLP in one block: (B, T, D) -> (B, T, D). Starts neutral: its output is zero until it is written."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, width, bias=False)
        self.down = nn.Linear(width, dim, bias=False)

    def forward(self, x_BTD: Tensor, weights: Optional[Tuple[Tensor, Tensor]] = None) -> Tensor:
        """Squared-ReLU MLP (Primer), with its own weights or those given: (up, down)."""
        if weights is None:
            return self.down(squared_relu(self.up(x_BTD)))
        up, down = weights
        return linear(squared_relu(linear(x_BTD, up)), down)


class Block(nn.Module):
    """A mixer of tokens, then this block's level MLPs, fastest first, joined as the wiring says.

    sequential and nested: a chain, each MLP with norm and residual (Eq. 70). independent: side by side on the same
    input, summed with learned weights (Eq. 74); these belong to the slowest level.
    """

    def __init__(self, cfg: ModelConfig, widths: Dict[str, int]) -> None:
        super().__init__()
        self.mixer = build_mixer(cfg)
        self.levels = nn.ModuleDict()
        for name, width in widths.items():
            try:
                self.levels[name] = LevelMLP(cfg.dim, width)
            except KeyError as error:  # torch keeps a few words for itself
                raise ValueError(f"levels: {name!r} is no name for a level ({error}); choose another") from None
        self.mix = nn.Parameter(torch.ones(len(widths))) if cfg.wiring == "independent" else None

    def forward(
        self, x_BTD: Tensor, rotary: Tuple[Tensor, Tensor], state: Any, weights: Dict[str, Tuple[Tensor, Tensor]]
    ) -> Tuple[Tensor, Any]:
        """(B, T, D) -> (B, T, D), and the mixer's state after the last token."""
        y_BTD, state = self.mixer(rms_norm(x_BTD), state, rotary)
        x_BTD = x_BTD + y_BTD
        if self.mix is not None:
            normed_BTD = rms_norm(x_BTD)
            for share, (name, mlp) in zip(self.mix, self.levels.items(), strict=True):
                x_BTD = x_BTD + share * mlp(normed_BTD, weights.get(name))
            return x_BTD, state
        for name, mlp in self.levels.items():
            x_BTD = x_BTD + mlp(rms_norm(x_BTD), weights.get(name))
        return x_BTD, state


def build_mixer(cfg: ModelConfig) -> nn.Module:
    """The module that mixes tokens: (x (B, T, D), state or None, rotary table) -> (y (B, T, D), state)."""
    if cfg.mixer == "attention":
        return RotaryAttention(cfg.dim, cfg.heads, cfg.window)
    from nl_model.memory.titans import SelfModifyingTitans  # noqa: PLC0415 (only who configures it pays for it)

    return SelfModifyingTitans(cfg.dim, cfg.heads, cfg.memory)


class NestedLM(Levelled):
    """Decoder language model with a continuum memory system.

    Parameters outside the levels' MLPs (embedding, mixers, head) belong to the slowest level.
    The head starts at zero, so the first loss is ln(vocab_size) exactly.
    """

    def __init__(self, cfg: ModelConfig, levels: Dict[str, LevelConfig], vocab_size: int) -> None:
        check_levels(levels, cfg.blocks)
        super().__init__(levels)
        self.wiring = cfg.wiring
        self.cfg, self.vocab_size = cfg, vocab_size
        self.checkpointing = False
        """Keep only what enters each block for the backward pass, and run the block again there."""
        self.embedding = nn.Embedding(vocab_size, cfg.dim)
        self.blocks = nn.ModuleList(
            Block(cfg, {n: levels[n].width for n in self.level_names if i in levels[n].block_indices(cfg.blocks)})
            for i in range(cfg.blocks)
        )
        self.head = nn.Linear(cfg.dim, vocab_size, bias=False)
        cos, sin = rotary_table(cfg.context, cfg.dim // cfg.heads, cfg.rope_base)
        self.cos_TK: Tensor
        self.sin_TK: Tensor
        self.register_buffer("cos_TK", cos, persistent=False)
        self.register_buffer("sin_TK", sin, persistent=False)

    def reset_parameters(self, seed: int) -> NestedLM:
        """Draw fresh weights from a generator of their own, so that nothing else in the process matters."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if ".mixer." in name and self.cfg.mixer == "titans":
                    continue  # its parts know how they begin
                if name.endswith(("down.weight", "out.weight")) or name == "head.weight":
                    parameter.zero_()
                elif parameter.dim() == 2:
                    std = 1.0 if name == "embedding.weight" else parameter.size(1) ** -0.5
                    parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        if self.cfg.mixer == "titans":
            for block in self.blocks:
                block.mixer.reset_parameters(generator)  # type: ignore[operator,union-attr]
        return self

    def forward(self, tokens_BT: Tensor, weights: Optional[Weights] = None) -> Tensor:
        """Next-token logits (B, T, V) for int64 tokens (B, T)."""
        return self.run(tokens_BT, None, weights)[0]

    def run(
        self, tokens_BT: Tensor, states: Optional[States] = None, weights: Optional[Weights] = None, position: int = 0
    ) -> Tuple[Tensor, States]:
        """Logits (B, T, V) and the mixers' states after the last token.

        Args:
            tokens_BT: int64; at most the context where there are no states to go on from.
            states: what `run` or `initial_states` returned for the tokens so far; None forgets them.
            weights: weights to use instead of the model's own.
            position: tokens so far.
        """
        rotary = self.rotary(position, tokens_BT.size(1))
        x_BTD = rms_norm(self.embedding(tokens_BT))
        x_BTD, after = self.run_blocks(x_BTD, 0, len(self.blocks), rotary, states, weights)
        return self.logits(x_BTD), after

    def run_blocks(
        self,
        x_BTD: Tensor,
        first: int,
        last: int,
        rotary: Tuple[Tensor, Tensor],
        states: Optional[States] = None,
        weights: Optional[Weights] = None,
    ) -> Tuple[Tensor, States]:
        """Blocks first to last - 1: (B, T, D) -> (B, T, D) and their states; `states` are those of all blocks."""
        after: List[Any] = []
        for index in range(first, last):
            block = self.blocks[index]
            replaced = self._replaced(index, weights) if weights else {}
            inputs = (x_BTD, rotary, None if states is None else states[index], replaced)
            if self.checkpointing and torch.is_grad_enabled():
                x_BTD, state = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTD, state = block(*inputs)
            after.append(state)
        return x_BTD, tuple(after)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Norm and head: (B, T, D) -> (B, T, V)."""
        return self.head(rms_norm(x_BTD))

    def rotary(self, position: int, length: int) -> Tuple[Tensor, Tensor]:
        """Rotary table (T, K) of `length` positions from `position`; computed where it lies outside the context."""
        if position + length <= self.cos_TK.size(0):
            return self.cos_TK[position : position + length], self.sin_TK[position : position + length]
        cos, sin = rotary_table(length, self.cfg.dim // self.cfg.heads, self.cfg.rope_base, position)
        return cos.to(self.cos_TK.device), sin.to(self.cos_TK.device)

    def initial_states(self, batch: int) -> States:
        """The states of all mixers before the first token of `batch` streams."""
        dtype = self.embedding.weight.dtype
        return tuple(block.mixer.initial_state(batch, dtype) for block in self.blocks)  # type: ignore[operator,union-attr]

    def _replaced(self, index: int, weights: Weights) -> Dict[str, Tuple[Tensor, Tensor]]:
        found = {}
        for level in self.blocks[index].levels:  # type: ignore[union-attr]
            prefix = f"blocks.{index}.levels.{level}"
            if f"{prefix}.up.weight" in weights:
                found[level] = (weights[f"{prefix}.up.weight"], weights[f"{prefix}.down.weight"])
        return found

    def nll(self, sequences_BS: Tensor, weights: Optional[Weights] = None) -> Tensor:
        """Loss per predicted token in nats, float32 (B, S - 1), of int64 sequences (B, S)."""
        return token_nll(self(sequences_BS[:, :-1], weights), sequences_BS[:, 1:])

    def level_of(self, parameter: str) -> str:
        """Name of the level that a parameter belongs to."""
        parts = parameter.split(".")
        if parts[0] == "blocks" and parts[2] == "levels":
            return parts[3]
        return self.level_names[-1]


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Context in which matrix products run in the given precision (fp32: as they are)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def resolve_device(device: str) -> torch.device:
    """The torch device that a configured name stands for; ValueError where cuda is asked for and absent."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("compute.device=cuda but torch sees no GPU; use compute.device=auto or cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
