"""The loss of a sleep step: the teacher on recent experience, the anchor on old, true tokens on both.

Shapes: B sequences, S stored tokens (context + 1), T = S - 1 predicted tokens.
"""

from __future__ import annotations

from typing import Dict, List, Mapping, Optional, Tuple

import torch
from torch import Tensor

from nl_model.distillation import Guide, distillation, divergence, top_k
from nl_model.losses import token_nll
from nl_model.model import NestedLM
from pipelines.config.sleep import SleepConfig


@torch.no_grad()
def guide_logits(
    teacher: Optional[NestedLM], anchor: Optional[NestedLM], sequences_BS: Tensor, recent_B: Tensor
) -> Dict[str, Tensor]:
    """Logits of the teacher on recent and of the anchor on old sequences; a model that is None is left out."""
    inputs_BT, guides = sequences_BS[:, :-1], {}
    if teacher is not None and bool(recent_B.any()):
        guides["teacher"] = teacher(inputs_BT[recent_B])
    if anchor is not None and not bool(recent_B.all()):
        guides["anchor"] = anchor(inputs_BT[~recent_B])
    return guides


def guide_divergence(logits_BTV: Tensor, guide: Guide, cfg: SleepConfig) -> Tensor:
    """Divergence of the student from a guide as configured, per token (B, T)."""
    if cfg.divergence != "topk":
        return divergence(logits_BTV, guide, cfg.divergence, cfg.jsd_beta)
    return divergence(logits_BTV, top_k(guide, cfg.top_k) if isinstance(guide, Tensor) else guide)


def guided(cfg: SleepConfig, recent_B: Tensor, factor: float = 1.0) -> List[Tuple[str, Tensor, float]]:
    """Each guide's name, its rows of a batch (B,) bool, and its weight times `factor` (see `mixing`)."""
    return [("teacher", recent_B, factor * cfg.teacher), ("anchor", ~recent_B, factor * cfg.anchor)]


def sleep_loss(
    logits_BTV: Tensor,
    sequences_BS: Tensor,
    recent_B: Tensor,
    guides: Mapping[str, Guide],
    cfg: SleepConfig,
    factor: float = 1.0,
) -> Tuple[Tensor, Dict[str, Tensor]]:
    """Loss of one sleep step in nats per token, and its detached parts by name.

    Args:
        logits_BTV: the student's logits on all of the batch.
        sequences_BS: int64 tokens.
        recent_B: which sequences are recent.
        guides: what `guide_logits` returned, or stored guides of the same rows.
        cfg: divergence and mixing weights.
        factor: of the mixing weights at this step.
    """
    nll_BT = token_nll(logits_BTV, sequences_BS[:, 1:])
    total_BT = nll_BT
    parts = {"truth_recent": nll_BT[recent_B], "truth_old": nll_BT[~recent_B]}
    for name, rows_B, weight in guided(cfg, recent_B, factor):
        if name in guides:
            divergence_BT = guide_divergence(logits_BTV[rows_B], guides[name], cfg)
            total_BT = total_BT.index_put((rows_B,), distillation(nll_BT[rows_B], divergence_BT, weight))
            parts[name] = divergence_BT
    return total_BT.mean(), means(parts)


def merge_weights(trained: Mapping[str, Tensor], anchor: Mapping[str, Tensor], weight: float) -> Dict[str, Tensor]:
    """(1 - weight) * trained + weight * anchor, for every tensor by name; on the devices of what has been trained."""
    return {name: torch.lerp(new, anchor[name].to(new), weight) for name, new in trained.items()}


def means(parts: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Detached means of what is not empty."""
    return {name: part.detach().mean() for name, part in parts.items() if part.numel()}
