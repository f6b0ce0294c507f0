"""M3: Algorithm 1 as printed, and the scale-invariant default; in float64."""

from __future__ import annotations

from typing import Any, List

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from nl_model.optim.m3 import M3
from nl_model.optim.muon import Muon, newton_schulz

SHAPE = (8, 12)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(count: int, scale: float = 1.0) -> List[Tensor]:
    return [scale * normal(*SHAPE, seed=100 + s) for s in range(count)]


def steps(found: List[Tensor], **settings: Any) -> List[Tensor]:
    """What each gradient moves a weight by."""
    weight = Parameter(torch.zeros(SHAPE, dtype=torch.float64))
    optimizer, moved = M3([weight], **settings), []
    for gradient in found:
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        moved.append(weight.detach() - before)
    return moved


def test_algorithm_1_by_hand() -> None:
    """The printed loop, over three periods of four steps."""
    b1, b2, b3, alpha, eta, eps, f = 0.9, 0.99, 0.5, 0.7, 0.1, 1e-8, 4
    found = gradients(3 * f)
    m1, m2, v = (torch.zeros(SHAPE, dtype=torch.float64) for _ in range(3))
    expected = []
    for k in range(3):
        previous = found[(k - 1) * f : k * f] if k else []
        m2 = m2 + b3 * sum(previous, torch.zeros(SHAPE, dtype=torch.float64))
        o2 = newton_schulz(m2)
        for g in found[k * f : (k + 1) * f]:
            m1, v = m1 + b1 * g, v + b2 * g**2
            expected.append(-eta * (newton_schulz(m1) + alpha * o2) / (v.sqrt() + eps))
    settings = {"betas": (b1, b2), "beta3": b3, "slow_weight": alpha, "slow_period": f, "eps": eps}
    moved = steps(found, lr=eta, literal=True, **settings)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(moved, expected, strict=True))


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_the_printed_form_depends_on_the_losss_scale(scale: float) -> None:
    """Check 20: literal, gradients c times as large make steps 1 / c as large, and steps shrink as they go on."""
    plain, scaled = steps(gradients(50), literal=True), steps(gradients(50, scale), literal=True)
    for a, b in zip(plain, scaled, strict=True):
        assert float(b.norm() / a.norm()) == pytest.approx(1 / scale, rel=1e-5)
    assert float(plain[49].norm()) < 0.2 * float(plain[0].norm())


@pytest.mark.parametrize("scale", [1e-6, 0.1, 10.0, 1e6])
def test_the_default_does_not_depend_on_the_losss_scale(scale: float) -> None:
    """Check 20: default, the same steps to 1e-6 whatever the loss is multiplied by, and they do not shrink."""
    plain, scaled = steps(gradients(50), lr=1.0), steps(gradients(50, scale), lr=1.0)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(plain, scaled, strict=True))
    assert float(plain[49].norm()) > 0.8 * float(plain[0].norm())


@pytest.mark.parametrize("literal", [False, True], ids=["default", "literal"])
def test_the_slow_momentum_turns_once_a_period(literal: bool) -> None:
    """Check 20: the slow buffer changes every f steps only and is first used in the next period."""
    period, weight = 5, Parameter(torch.zeros(SHAPE, dtype=torch.float64))
    optimizer, changed, before = M3([weight], slow_period=period, literal=literal), [], torch.zeros(SHAPE)
    for number, gradient in enumerate(gradients(17), start=1):
        weight.grad = gradient
        optimizer.step()
        after = optimizer.state[weight].get("slow", torch.zeros(SHAPE)).clone()
        if not torch.equal(before.double(), after.double()):
            changed.append(number)
        before = after
    assert changed == [5, 10, 15]

    with_slow = steps(gradients(10), slow_period=period, literal=literal, slow_weight=0.5)
    without = steps(gradients(10), slow_period=period, literal=literal, slow_weight=0.0)
    differs = [n for n, (a, b) in enumerate(zip(with_slow, without, strict=True), start=1) if not torch.allclose(a, b)]
    assert differs == [6, 7, 8, 9, 10]


def test_without_the_slow_momentum_it_is_muon() -> None:
    """An average and a sum of gradients have the same direction."""
    weight = Parameter(torch.zeros(SHAPE, dtype=torch.float64))
    muon = Muon([weight], lr=0.02, momentum=0.9)
    for gradient, moved in zip(gradients(10), steps(gradients(10), slow_weight=0.0), strict=True):
        before = weight.detach().clone()
        weight.grad = gradient
        muon.step()
        assert torch.allclose(weight.detach() - before, moved, rtol=0, atol=1e-12)
