"""Generation: sampling and streaming, with everything attended to or in fixed memory, writing fast levels or not.

Shapes: B sequences, N tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import List, Optional

import torch
from torch import Tensor

from nl_model.model import NestedLM
from nl_model.streaming import StreamingModel


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Draw from the k most likely tokens only; 0 from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens that together have this probability (nucleus sampling)."""
    seed: int = 0
    """Seed of the draws; the same seed gives the same text."""

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature={self.temperature} must be at least 0 (0 takes the most likely token)")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 0 (0 draws from all tokens)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")


def sample(logits_BV: Tensor, cfg: SamplingConfig, generator: Optional[torch.Generator] = None) -> Tensor:
    """Draw one token per row: int64 (B,)."""
    if cfg.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float() / cfg.temperature
    if 0 < cfg.top_k < logits_BV.size(-1):
        least_B1 = logits_BV.topk(cfg.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if cfg.top_p < 1:
        ordered_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        probability_BV = ordered_BV.softmax(-1)
        # A token stays while those before it do not yet have the mass; the first one always does.
        beyond_BV = probability_BV.cumsum(-1) - probability_BV >= cfg.top_p
        logits_BV = logits_BV.masked_fill(beyond_BV.gather(-1, order_BV.argsort(-1)), -torch.inf)
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator).squeeze(1)


class Reader:
    """Plain inference: mixer states and a position, no weights of a sequence's own. Feeds like a `StreamingModel`."""

    def __init__(self, model: NestedLM, batch: int) -> None:
        self.model, self.states, self.position = model, model.initial_states(batch), 0

    @torch.no_grad()
    def feed(self, tokens_BN: Tensor) -> Tensor:
        """Read tokens, int64 (B, N), at most a context of them at once; returns logits (B, N, V)."""
        out: List[Tensor] = []
        for piece_BN in tokens_BN.split(self.model.cfg.context, 1):
            logits_BNV, self.states = self.model.run(piece_BN, self.states, None, self.position)
            self.position += piece_BN.size(1)
            out.append(logits_BNV)
        return torch.cat(out, 1)


def generate(
    model: NestedLM,
    prompt_BN: Tensor,
    new_tokens: int,
    cfg: Optional[SamplingConfig] = None,
    learn: bool = False,
    stream: Optional[StreamingModel] = None,
) -> Iterator[Tensor]:
    """Yield `new_tokens` tokens after a prompt, int64 (B,) each, as they are drawn.

    What is remembered is the mixer's matter: all keys and values with full attention, a fixed-size memory with a
    window or with titans.

    Args:
        prompt_BN: int64, at least one token per row.
        learn: let every sequence write fast levels of its own from the prompt and from what it says itself.
        stream: go on with this one, for instance one that has read a long text already; it keeps its own `learn`.
    """
    if prompt_BN.dim() != 2 or not prompt_BN.size(1):
        raise ValueError(f"the prompt has shape {tuple(prompt_BN.shape)}; give (B, N) tokens, N at least 1")
    cfg = cfg or SamplingConfig()
    batch = prompt_BN.size(0)
    reader = stream or (StreamingModel(model, batch) if learn else Reader(model, batch))
    generator = torch.Generator(device=prompt_BN.device).manual_seed(cfg.seed)
    logits_BV = reader.feed(prompt_BN)[:, -1]
    for index in range(new_tokens):
        token_B = sample(logits_BV, cfg, generator)
        yield token_B
        if index + 1 < new_tokens:
            logits_BV = reader.feed(token_B[:, None])[:, -1]


def complete(
    model: NestedLM, prompt_BN: Tensor, new_tokens: int, cfg: Optional[SamplingConfig] = None, learn: bool = False
) -> Tensor:
    """Prompt and continuation: int64 (B, N + new_tokens)."""
    tokens: List[Tensor] = [t[:, None] for t in generate(model, prompt_BN, new_tokens, cfg, learn)]
    return torch.cat([prompt_BN, *tokens], 1)
