"""The loss against its formula in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from nl_model.losses import token_nll

B, T, V = 2, 3, 7


def logits(seed: int) -> Tensor:
    return torch.randn(B, T, V, generator=torch.Generator().manual_seed(seed)) * 3


def test_token_nll_is_minus_the_log_probability_of_the_target() -> None:
    targets = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))
    expected = -logits(1).double().softmax(-1).log().gather(-1, targets[..., None])[..., 0]
    found = token_nll(logits(1), targets)
    assert found.shape == (B, T) and found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert token_nll(logits(1).bfloat16(), targets).dtype == torch.float32
