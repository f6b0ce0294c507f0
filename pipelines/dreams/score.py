"""What a dream is worth: gradient norm, learning progress, and the reward of a copy that was trained on it.

Only the last block is differentiated and trained here; the blocks below are read once. Shapes: B dreams, M measured
sequences, S stored tokens, T = S - 1, D model width, P prompt tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Dict, List

import torch
from torch import Tensor
from torch.func import functional_call

from nl_model.losses import token_nll
from nl_model.model import NestedLM
from nl_model.pointwise import rms_norm
from pipelines.config.dreams import DreamConfig

Weights = Dict[str, Tensor]


def gradient_norms(tail: Tail, rows: Sequence[int], prompt: int, cfg: DreamConfig) -> List[float]:
    """Norm of the last block's gradient of the mean loss behind the prompt, for each of some dreams.

    To first order, a step of length eta along the gradient takes eta times this norm off the loss.
    """
    return [float(_norm(tail.gradient(tail.weights, slice(b, b + 1), prompt))) for b in rows]


@torch.no_grad()
def learning_progress(tail: Tail, rows: Sequence[int], prompt: int, cfg: DreamConfig) -> List[float]:
    """Loss behind the prompt that one step on a copy takes off, nats per token, for each of some dreams."""
    found = []
    for b in rows:
        row = slice(b, b + 1)
        stepped = tail.step(tail.weights, row, cfg.reward_lr, prompt)
        found.append(float(tail.loss(tail.weights, row, prompt) - tail.loss(stepped, row, prompt)))
    return found


@torch.no_grad()
def rewards(model: NestedLM, sequences_BS: Tensor, measure_MS: Tensor, cfg: DreamConfig) -> List[float]:
    """Loss that training a copy on each dream alone takes off held-out experience, nats per token."""
    tail, held, found = Tail(model, sequences_BS), Tail(model, measure_MS), []
    everything = slice(0, len(measure_MS))
    before = held.loss(held.weights, everything)
    for b in range(len(sequences_BS)):
        weights = tail.weights
        for _ in range(cfg.reward_steps):
            weights = tail.step(weights, slice(b, b + 1), cfg.reward_lr)
        found.append(float(before - held.loss(weights, everything)))
    return found


@torch.no_grad()
def trained_copy(model: NestedLM, sequences_BS: Tensor, cfg: DreamConfig) -> NestedLM:
    """A copy of the model whose last block was trained on rewarded dreams, `cfg.reward_steps` passes over them."""
    tail = Tail(model, sequences_BS)
    weights = tail.weights
    for _ in range(cfg.reward_steps):
        for b in range(len(sequences_BS)):
            weights = tail.step(weights, slice(b, b + 1), cfg.reward_lr)
    dreamer = copy.deepcopy(model)
    for name, parameter in dreamer.blocks[-1].named_parameters():
        parameter.copy_(weights[name])
    return dreamer


class Tail:
    """The last block and the head as a function of the last block's weights, over fixed sequences."""

    def __init__(self, model: NestedLM, sequences_BS: Tensor) -> None:
        self.model, self.block = model, model.blocks[-1]
        self.targets_BT = sequences_BS[:, 1:]
        self.rotary = model.rotary(0, sequences_BS.size(1) - 1)
        self.weights: Weights = {name: p.detach() for name, p in self.block.named_parameters()}
        with torch.no_grad():
            x_BTD = rms_norm(model.embedding(sequences_BS[:, :-1]))
            self.x_BTD, _ = model.run_blocks(x_BTD, 0, len(model.blocks) - 1, self.rotary)

    def loss(self, weights: Weights, rows: slice, prompt: int = 1) -> Tensor:
        """Mean loss of some rows behind the first `prompt` tokens."""
        return self.losses(weights, rows, prompt).mean()

    def losses(self, weights: Weights, rows: slice, prompt: int = 1) -> Tensor:
        """Mean loss of each of some rows behind the first `prompt` tokens: (B,)."""
        y_BTD, _ = functional_call(self.block, weights, (self.x_BTD[rows], self.rotary, None, {}))
        return token_nll(self.model.logits(y_BTD), self.targets_BT[rows])[:, prompt - 1 :].mean(1)

    def gradient(self, weights: Weights, rows: slice, prompt: int = 1) -> Weights:
        """Gradient of `loss` by the last block's weights."""
        leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
        with torch.enable_grad():
            gradients = torch.autograd.grad(self.loss(leaves, rows, prompt), list(leaves.values()))
        return dict(zip(leaves, gradients, strict=True))

    def step(self, weights: Weights, rows: slice, length: float, prompt: int = 1) -> Weights:
        """Weights after one step against the gradient, `length` times the norm of the weights long."""
        gradient = self.gradient(weights, rows, prompt)
        scale = length * _norm(weights) / (_norm(gradient) + 1e-12)
        return {name: w - scale * gradient[name] for name, w in weights.items()}


def _norm(tensors: Weights) -> Tensor:
    return torch.stack([t.float().square().sum() for t in tensors.values()]).sum().sqrt()
