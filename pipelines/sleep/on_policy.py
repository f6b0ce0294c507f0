"""On-policy steps: the student continues stored text itself, and is measured, and rewarded, on what it continuation.

Generalised distillation mixes divergences on stored and on the student's own text, (1 - lambda) E_D[F] + lambda E_S[F]
(Agarwal et al. 2024; lambda is sleep.on_policy): each step is of one kind, drawn by its seed. Learning to imitate
(Sleep, Eq. 3 and 4, and the objective KS) adds a reward for what the guide would have written. Text is sampled without
gradient; the reward reaches the student as the weight of its log-likelihood (REINFORCE) against a baseline.

Shapes: B sequences, P prompt tokens, n continued tokens, S = P + n, T = S - 1 predicted tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Mapping, Tuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nl_model.distillation import distillation
from nl_model.losses import token_nll
from nl_model.model import NestedLM
from pipelines.config.sleep import ImitationConfig, SleepConfig
from pipelines.sleep.losses import guide_divergence, guided, means

STUDENT, GUIDE = 0, 1
"""Whose draw a random number is for: the two must not depend on each other, or the reward's gradient is wrong."""
_CHOICE = 2


@dataclass(frozen=True)
class Continuation:
    """A text and where its continuation begins."""

    sequences_BS: Tensor
    """Prompt and continuation, int64."""
    prompt: int
    """P, at least 2."""
    log_p_Bn: Tensor
    """What the model gave each token of it, in nats, without gradient."""


def prompt_length(cfg: SleepConfig, stored: int, seed: int, step: int) -> int:
    """Tokens of stored text that a step keeps before the student goes on; 0: the step is an ordinary one.

    A function of (seed, step), the same on all ranks: text is cut anywhere in the second half of what leaves room for
    the continuation in `stored` tokens.
    """
    if not cfg.on_policy:
        return 0
    draw = np.random.default_rng([seed, step, _CHOICE])
    if draw.random() >= cfg.on_policy:
        return 0
    longest = stored - cfg.continuation
    return int(draw.integers(max(2, longest // 2), longest, endpoint=True))


def uniforms(seed: int, step: int, keys: npt.NDArray[np.int64], count: int, speaker: int) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), (B, count): a function of (seed, step, key, speaker); ranks and places do not matter."""
    rows = [np.random.default_rng([seed, step, speaker, int(key) % (1 << 64)]).random(count) for key in keys]
    return np.stack(rows) if rows else np.empty((0, count))


@torch.no_grad()
def continue_text(model: NestedLM, prompt_BP: Tensor, uniform_Bn: npt.NDArray[np.float64]) -> Continuation:
    """A model's continuation of prompts, one token per random number, by inverting the cumulative distribution."""
    draw_Bn = torch.from_numpy(uniform_Bn).to(prompt_BP.device)
    states, position = model.initial_states(len(prompt_BP)), 0
    tokens_BN, text, log_p = prompt_BP, [prompt_BP], []
    for draw_B in draw_Bn.unbind(1):
        logits_BNV, states = model.run(tokens_BN, states, None, position)
        position += tokens_BN.size(1)
        log_p_BV = logits_BNV[:, -1].double().log_softmax(-1)
        mass_BV = log_p_BV.exp().cumsum(-1)
        tokens_BN = (mass_BV <= draw_B[:, None] * mass_BV[:, -1:]).sum(-1, keepdim=True)
        text.append(tokens_BN)
        log_p.append(log_p_BV.gather(-1, tokens_BN))
    return Continuation(torch.cat(text, 1), prompt_BP.size(1), torch.cat(log_p, 1))


def levenshtein(a_BN: npt.NDArray[np.integer], b_BM: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Fewest insertions, deletions and substitutions from row to row: int64 (B,)."""
    places = np.arange(b_BM.shape[1] + 1)
    row = np.broadcast_to(places, (len(a_BN), len(places))).astype(np.int64)
    for i in range(a_BN.shape[1]):
        below = np.empty_like(row)
        below[:, 0] = i + 1
        below[:, 1:] = np.minimum(row[:, 1:] + 1, row[:, :-1] + (b_BM != a_BN[:, i : i + 1]))
        # An insertion costs one more than its left neighbour: a running minimum, once the place is taken off.
        row = np.minimum.accumulate(below - places, axis=1) + places
    return np.asarray(row[:, -1])


def surface_reward(
    text_Bn: npt.NDArray[np.integer], model_Bm: npt.NDArray[np.integer], cutoff: int
) -> npt.NDArray[np.float64]:
    """1 - z / max(n, m) where the edit distance z is at most `cutoff`, else 0 (Sleep, Eq. 4): (B,)."""
    distance = levenshtein(text_Bn, model_Bm)
    return np.where(distance <= cutoff, 1.0 - distance / max(text_Bn.shape[1], model_Bm.shape[1]), 0.0)


def imitation_reward(continuation: Continuation, guide_BTV: Tensor, own: Continuation, cfg: ImitationConfig) -> Tensor:
    """Reward in [0, 1] (B,), float32, for what the student wrote (Sleep, Eq. 3).

    The semantic part is 1 where the guide finds the student's text at most `threshold` nats per token less likely than
    its own continuation of the same prompt, else 0: the guide is its own frozen reward model.

    Args:
        guide_BTV: the guide's logits on `continuation`.
        own: what the guide continuation.
    """
    first = continuation.prompt - 1
    likelihood_B = -token_nll(guide_BTV[:, first:], continuation.sequences_BS[:, continuation.prompt :]).mean(1)
    semantic_B = (likelihood_B >= own.log_p_Bn.mean(1) - cfg.threshold).float()
    texts = [text.sequences_BS[:, text.prompt :].cpu().numpy() for text in (continuation, own)]
    surface_B = torch.from_numpy(surface_reward(texts[0], texts[1], cfg.cutoff)).to(semantic_B)
    return cfg.semantic * semantic_B + (1 - cfg.semantic) * surface_B


def advantage(reward_B: Tensor) -> Tensor:
    """Reward above the mean of the other sequences, (B,): a baseline that a sequence's own text does not move.

    Of a single sequence it is the reward itself.
    """
    others = max(1, len(reward_B) - 1)
    return reward_B - (reward_B.sum() - reward_B) / others


def on_policy_loss(
    logits_BTV: Tensor,
    continuation: Continuation,
    recent_B: Tensor,
    guides: Mapping[str, Tensor],
    rewards: Mapping[str, Tensor],
    cfg: SleepConfig,
    factor: float = 1.0,
) -> Tuple[Tensor, Dict[str, Tensor]]:
    """Loss of an on-policy step in nats per token, and its detached parts by name.

    True tokens count on the prompt, the guide on the continuation, each as a mean over its tokens, mixed by the weights
    of an ordinary step. The guide's part is (1 - w) F - w (r - baseline) log q(continuation), the objective KS per
    continued token (w is sleep.imitation.weight, KS's 1 - alpha).

    Args:
        logits_BTV: the student's logits on `continuation`.
        recent_B: which sequences are recent.
        guides: logits of the teacher on recent, of the anchor on old sequences of `continuation`.
        rewards: `imitation_reward` of the rows of each guide, or empty.
        cfg: divergence, weights and reward.
        factor: of the mixing weights at this step.
    """
    first, share = continuation.prompt - 1, cfg.imitation.weight
    nll_BT = token_nll(logits_BTV, continuation.sequences_BS[:, 1:])
    truth_B = nll_BT[:, :first].mean(1)
    total_B = truth_B
    parts: Dict[str, Tensor] = {}
    for name, rows_B, weight in guided(cfg, recent_B, factor):
        if name not in guides:
            continue
        divergence_Bn = guide_divergence(logits_BTV[rows_B, first:], guides[name][:, first:], cfg)
        objective_B, parts[f"on_policy_{name}"] = divergence_Bn.mean(1), divergence_Bn
        if name in rewards:
            reinforced_B = advantage(rewards[name]) * nll_BT[rows_B, first:].mean(1)
            objective_B = (1 - share) * objective_B + share * reinforced_B
            parts[f"reward_{name}"] = rewards[name]
        total_B = total_B.index_put((rows_B,), distillation(truth_B[rows_B], objective_B, weight))
    return total_B.mean(), means(parts)
