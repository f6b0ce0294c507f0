"""Distillation: divergences of a student from a guide, and the mixture with true tokens that a student minimises.

A guide gives its logits, or the k most likely tokens of every position and the mass of all others (`TopK`). The tail
then is one bucket for both sides: divergences of the two coarser distributions are divergences still, zero where they
agree, and never above the full ones (data processing). With all tokens named they are the full ones.

Results are in nats per token, float32 (float64 for float64 logits). Gradients are of first order, reach the student
alone, and cost one tensor of the logits' shape.
Shapes: T tokens of any leading dimensions, V vocabulary, K tokens named, C categories (V, or K + 1 buckets).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Optional, Tuple, Union

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nl_model.config import DIVERGENCES

FLOOR = -1e4
"""Stands for log 0 of a bucket, so that what has no mass on either side adds exactly nothing."""


@dataclass(frozen=True)
class TopK:
    """A distribution per position, told by its most likely tokens; what they leave is the tail."""

    ids_TK: Tensor
    """int64; no token twice in a row."""
    log_p_TK: Tensor
    """Log-probability of each."""
    log_tail_T: Tensor
    """Log-probability of all other tokens together; -inf where there are none."""

    def __getitem__(self, at: Any) -> TopK:
        """The same positions of every part."""
        return TopK(self.ids_TK[at], self.log_p_TK[at], self.log_tail_T[at])


Guide = Union[Tensor, TopK]
"""Logits (T, V), or a `TopK`."""


def top_k(logits_TV: Tensor, k: int) -> TopK:
    """The k most likely tokens (all, where k is more) and the tail, without gradient."""
    log_p_TV = F.log_softmax(_wide(logits_TV.detach()), dim=-1)
    log_p_TK, ids_TK = log_p_TV.topk(min(k, log_p_TV.size(-1)), dim=-1)
    return TopK(ids_TK, log_p_TK, log_p_TV.scatter_(-1, ids_TK, -torch.inf).logsumexp(-1))


def divergence(student_TV: Tensor, guide: Guide, kind: str = "forward_kl", beta: float = 0.5) -> Tensor:
    """Divergence (T,) of the student's distribution Q, from its logits, from the guide's P.

    forward_kl: KL(P || Q). reverse_kl: KL(Q || P). jsd: b KL(P || M) + (1 - b) KL(Q || M) with M = b P + (1 - b) Q, the
    generalised Jensen-Shannon divergence (Agarwal et al. 2024); b near 0 tends to b KL(P || Q), b near 1 to
    (1 - b) KL(Q || P). For b 0.5 it is symmetric, and at most log 2.

    Args:
        kind: one of DIVERGENCES.
        beta: b above, in (0, 1).
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"divergence={kind!r} is unknown; use one of {', '.join(DIVERGENCES)}")
    if not 0 < beta < 1:
        raise ValueError(f"beta={beta} must lie in (0, 1); for its ends use forward_kl and reverse_kl")
    student_TV = _wide(student_TV)
    if isinstance(guide, TopK):
        log_p_TC = torch.cat((guide.log_p_TK, guide.log_tail_T.unsqueeze(-1)), -1).detach().to(student_TV.dtype)
        log_p_TC = F.log_softmax(log_p_TC, dim=-1)  # what was rounded to be stored sums to one again
        return _Divergence.apply(student_TV, log_p_TC.clamp_(min=FLOOR), guide.ids_TK, kind, beta)
    log_p_TV = F.log_softmax(guide.detach().to(student_TV.dtype), dim=-1)
    return _Divergence.apply(student_TV, log_p_TV, None, kind, beta)


def forward_kl(student_TV: Tensor, guide: Guide) -> Tensor:
    """KL(guide || student) per token (T,)."""
    return divergence(student_TV, guide, "forward_kl")


def reverse_kl(student_TV: Tensor, guide: Guide) -> Tensor:
    """KL(student || guide) per token (T,)."""
    return divergence(student_TV, guide, "reverse_kl")


def distillation(nll_BT: Tensor, divergence_BT: Tensor, weight: float) -> Tensor:
    """Mixture (1 - weight) * true tokens + weight * guide, per token (B, T)."""
    return (1.0 - weight) * nll_BT + weight * divergence_BT


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _value_and_gradient(
    log_q_TC: Tensor, log_p_TC: Tensor, kind: str, beta: float, wanted: bool
) -> Tuple[Tensor, Optional[Tensor]]:
    """Divergence (T,) and, if wanted, its gradient (T, C) by the logits of Q; may overwrite both inputs.

    With G = dD/dQ the gradient by logits is Q (G - sum_c Q_c G_c).
    """
    if kind == "forward_kl":
        p_TC = log_p_TC.exp()
        value_T = torch.linalg.vecdot(p_TC, log_p_TC.sub_(log_q_TC))
        return value_T, log_q_TC.exp_().sub_(p_TC) if wanted else None
    q_TC = log_q_TC.exp()
    if kind == "reverse_kl":  # G = log Q/P + 1
        ratio_TC = torch.sub(log_q_TC, log_p_TC, out=log_p_TC)
        value_T = torch.linalg.vecdot(q_TC, ratio_TC)
        return value_T, ratio_TC.sub_(value_T.unsqueeze(-1)).mul_(q_TC) if wanted else None
    log_m_TC = torch.logaddexp(log_p_TC + math.log(beta), log_q_TC + math.log1p(-beta))
    p_TC = log_p_TC.exp()
    ahead_T = torch.linalg.vecdot(p_TC, log_p_TC.sub_(log_m_TC))
    ratio_TC = torch.sub(log_q_TC, log_m_TC, out=log_m_TC)
    behind_T = torch.linalg.vecdot(q_TC, ratio_TC)  # G = (1 - b) log Q/M: the rest of the derivative is constant
    value_T = beta * ahead_T + (1 - beta) * behind_T
    return value_T, ratio_TC.sub_(behind_T.unsqueeze(-1)).mul_(q_TC).mul_(1 - beta) if wanted else None


class _Divergence(torch.autograd.Function):
    """The gradient is known as soon as the value is; it is kept instead of what it would be computed from."""

    @staticmethod
    def forward(
        ctx: Any, student_TV: Tensor, log_p_TC: Tensor, ids_TK: Optional[Tensor], kind: str, beta: float
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        log_q_TV = F.log_softmax(student_TV, dim=-1)
        if ids_TK is None:
            value_T, gradient_TV = _value_and_gradient(log_q_TV, log_p_TC, kind, beta, wanted)
        else:
            named_TK = log_q_TV.gather(-1, ids_TK)
            others_TV = log_q_TV.scatter_(-1, ids_TK, -torch.inf)
            tail_T1 = others_TV.logsumexp(-1, keepdim=True).clamp_(min=FLOOR)
            log_q_TC = torch.cat((named_TK, tail_T1), -1)
            value_T, gradient_TC = _value_and_gradient(log_q_TC, log_p_TC, kind, beta, wanted)
            gradient_TV = None
            if gradient_TC is not None:  # within the tail, in proportion to what the student gives each token
                gradient_TV = others_TV.sub_(tail_T1).exp_().mul_(gradient_TC[..., -1:])
                gradient_TV.scatter_(-1, ids_TK, gradient_TC[..., :-1])
        if gradient_TV is not None:
            ctx.save_for_backward(gradient_TV)
        return value_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_T: Tensor) -> Tuple[Optional[Tensor], None, None, None, None]:
        (gradient_TV,) = ctx.saved_tensors
        return gradient_TV * gradient_T.unsqueeze(-1), None, None, None, None
