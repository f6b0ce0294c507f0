"""What holds a plainly trained model to its past: online EWC, distillation, averaging, adapters.

Shapes: B sequences, T tokens, V vocabulary, K stored log-probabilities.
"""

from __future__ import annotations

import copy
from typing import Dict, List, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nl_model.distillation import TopK, forward_kl, top_k
from nl_model.model import NestedLM


class ElasticWeights:
    """Online EWC (Schwarz et al. 2018): a quadratic pull to the last boundary's weights, by their Fisher diagonal.

    The diagonals of all boundaries are summed and scaled to a mean of one, so that a strength means the same anywhere.
    """

    def __init__(self, model: nn.Module, strength: float) -> None:
        self.model, self.strength = model, strength
        self.fisher: Dict[str, Tensor] = {}
        self.start: Dict[str, Tensor] = {}

    def boundary(self, sequences: List[Tensor]) -> int:
        """Add the Fisher diagonal at the present weights, from one gradient per sequence; returns tokens passed."""
        assert isinstance(self.model, NestedLM)
        total = {n: torch.zeros_like(p) for n, p in self.model.named_parameters()}
        tokens = 0
        for sequence_S in sequences:
            self.model.zero_grad(set_to_none=True)
            self.model.nll(sequence_S[None]).mean().backward()
            tokens += len(sequence_S) - 1
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    total[name] += parameter.grad.square()
        self.model.zero_grad(set_to_none=True)
        mean = sum(float(t.sum()) for t in total.values()) / sum(t.numel() for t in total.values())
        for name, parameter in self.model.named_parameters():
            self.fisher[name] = self.fisher.get(name, 0.0) + total[name] / max(mean, 1e-30)
            self.start[name] = parameter.detach().clone()
        return tokens

    def penalty(self) -> Tensor | float:
        """strength / 2 * sum of F (w - w*)^2."""
        if not self.fisher:
            return 0.0
        pulls = [(self.fisher[n] * (p - self.start[n]).square()).sum() for n, p in self.model.named_parameters()]
        return 0.5 * self.strength * torch.stack(pulls).sum()


class AverageWeights:
    """An exponential average of the weights over steps (scored instead of the trained ones)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.average = copy.deepcopy(model)

    @torch.no_grad()
    def step(self) -> None:
        """Move the average towards the present weights."""
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1.0 - self.decay)


class Adapted(nn.Module):
    """A linear map with a low-rank adapter beside it: x W^T + x A^T B^T; W rests."""

    def __init__(self, inner: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.inner = inner
        inner.weight.requires_grad_(False)
        out, size = inner.weight.shape
        self.a = nn.Parameter(torch.empty(rank, size, device=inner.weight.device))
        self.b = nn.Parameter(torch.zeros(out, rank, device=inner.weight.device))
        self.restart(generator)

    @torch.no_grad()
    def restart(self, generator: torch.Generator) -> None:
        """A fresh adapter, which changes nothing yet."""
        drawn = torch.empty(self.a.shape).normal_(0.0, self.a.size(1) ** -0.5, generator=generator)
        self.a.copy_(drawn)
        self.b.zero_()

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the weight."""
        self.inner.weight.add_(self.b @ self.a)

    def forward(self, x: Tensor) -> Tensor:
        """The adapted map."""
        return self.inner(x) + F.linear(F.linear(x, self.a), self.b)


def adapt(model: NestedLM, rank: int, generator: torch.Generator) -> List[Adapted]:
    """Put an adapter beside every linear map of the blocks; only adapters train from then on."""
    model.requires_grad_(False)
    found: List[Adapted] = []
    for module in list(model.blocks.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                adapter = Adapted(child, rank, generator)
                setattr(module, name, adapter)
                found.append(adapter)
    return found


def keep_top(logits_BTV: Tensor, top: int) -> Tuple[Tensor, Tensor]:
    """Ids int16 and float16 log-probabilities (B, T, K) of the likeliest tokens: what is stored of a distribution."""
    kept = top_k(logits_BTV, top)
    return kept.ids_TK.to(torch.int16), kept.log_p_TK.half()


def top_divergence(logits_BTV: Tensor, ids_BTK: Tensor, logs_BTK: Tensor) -> Tensor:
    """KL(stored || student) per token (B, T), everything outside the stored ids being one bucket."""
    logs_BTK = logs_BTK.float()
    tail_BT = torch.log1p(-logs_BTK.exp().sum(-1).clamp_max(1.0 - 1e-6))
    return forward_kl(logits_BTV, TopK(ids_BTK.long(), logs_BTK, tail_BT))


def frozen_copy(model: NestedLM) -> NestedLM:
    """A copy that takes no gradient."""
    return copy.deepcopy(model).requires_grad_(False)
