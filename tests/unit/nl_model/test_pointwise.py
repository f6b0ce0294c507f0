"""Norm, rotation, activation and loss against what torch composes them of; gradients of first and second order."""

from __future__ import annotations

from typing import Callable, Dict, Tuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nl_model.attention import rotary_table
from nl_model.pointwise import rms_norm, rotate, squared_relu, target_nll

COS, SIN = (table.double() for table in rotary_table(5, 6, 100.0, start=3))
TARGETS = torch.arange(30) % 6


def plain_rotation(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = COS.to(x.dtype), SIN.to(x.dtype)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def plain_nll(x: Tensor) -> Tensor:
    return F.cross_entropy(x.reshape(-1, 6), TARGETS, reduction="none")


PAIRS: Dict[str, Tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "rms_norm": (rms_norm, lambda x: F.rms_norm(x, (x.size(-1),))),
    "rotate": (lambda x: rotate(x, COS.to(x.dtype), SIN.to(x.dtype)), plain_rotation),
    "target_nll": (lambda x: target_nll(x.reshape(-1, 6), TARGETS), plain_nll),
    "squared_relu": (squared_relu, lambda x: F.relu(x).square()),
}


def draw(dtype: torch.dtype = torch.float64) -> Tensor:
    """Strided like a head's queries: (2, 3, 5, 6)."""
    x = torch.randn(2, 5, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.to(dtype).transpose(1, 2)


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients_are_torchs(name: str) -> None:
    ours, theirs = PAIRS[name]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        results = []
        for function in (ours, theirs):
            x = draw(dtype).requires_grad_()
            y = function(x)
            (gradient,) = torch.autograd.grad((y * y.detach().cos()).sum(), x)
            results.append((y, gradient))
        for left, right in zip(*results, strict=True):
            assert left.dtype == dtype
            torch.testing.assert_close(left, right, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_of_both_orders_match_finite_differences(name: str) -> None:
    x = draw().contiguous().requires_grad_()
    assert torch.autograd.gradcheck(PAIRS[name][0], x)
    assert torch.autograd.gradgradcheck(PAIRS[name][0], x)


@pytest.mark.parametrize("name", PAIRS)
def test_the_input_stays_as_it_is(name: str) -> None:
    x = draw()
    before = x.clone()
    PAIRS[name][0](x)
    assert torch.equal(x, before)


def test_half_precision_and_zeros() -> None:
    x = draw(torch.bfloat16)
    assert rms_norm(x).dtype == squared_relu(x).dtype == torch.bfloat16
    table = COS.float(), SIN.float()
    turned = rotate(x.requires_grad_(), *table)
    assert turned.dtype == torch.float32, "angles are not rounded"
    turned.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    zero = torch.zeros(2, 4, requires_grad=True)
    rms_norm(zero).sum().backward()
    assert zero.grad is not None and bool(zero.grad.isfinite().all())
