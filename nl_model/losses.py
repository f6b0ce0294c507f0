"""The next-token loss.

Shapes: B batch, T tokens, V vocabulary. Results are float32 (float64 for float64 logits), in nats per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nl_model.pointwise import target_nll


def token_nll(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Negative log-likelihood of int64 targets (B, T) under logits (B, T, V): (B, T)."""
    logits = logits_BTV if logits_BTV.dtype == torch.float64 else logits_BTV.float()
    return target_nll(logits.flatten(0, 1), targets_BT.flatten()).view_as(targets_BT)
