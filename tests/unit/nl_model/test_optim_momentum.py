"""Momentum as a memory: delta momentum and deep momentum, in float64."""

from __future__ import annotations

from typing import Any, Dict, List

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from nl_model.optim.deep_momentum import DeepMomentum, memorise_, recall, unit_rows
from nl_model.optim.delta_momentum import DeltaMomentum, delta_write_
from nl_model.optim.muon import Muon


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(optimizer: torch.optim.Optimizer, weight: Parameter, gradients: List[Tensor]) -> List[Tensor]:
    """Weights after every write."""
    after = []
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        after.append(weight.detach().clone())
    return after


@pytest.mark.parametrize("shape", [(4, 6), (6,), (2, 4, 6)], ids=str)
def test_delta_momentum_without_erasing_is_plain_momentum(shape: Any) -> None:
    """Check 22: erase off = torch's SGD with momentum, without any difference."""
    ours, theirs, gradients = (
        Parameter(normal(*shape)),
        Parameter(normal(*shape)),
        [normal(*shape, seed=s) for s in range(9)],
    )
    expected = run(torch.optim.SGD([theirs], lr=0.1, momentum=0.9), theirs, gradients)
    found = run(DeltaMomentum([ours], lr=0.1, momentum=0.9, erase=0.0), ours, gradients)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)], ids=str)
def test_delta_momentum_by_hand(shape: Any) -> None:
    """Eq. 49, both forms: m (alpha - g^T g) + g, with g as it is and with g of norm 1."""
    for literal in (True, False):
        momentum = normal(*shape)
        expected = momentum.clone()
        for seed in (1, 2):
            g = normal(*shape, seed=seed)
            key = g if literal else g / g.norm()
            erase = 1.0 if literal else 0.7
            eye = torch.eye(shape[1], dtype=torch.float64)
            expected = expected @ (0.9 * eye - erase * key.T @ key) + g
            delta_write_(momentum, g, 0.9, 0.7, literal)
        assert torch.allclose(momentum, expected, rtol=0, atol=1e-12)


def test_the_printed_form_diverges_where_the_default_does_not() -> None:
    """Eq. 49 has no step size on the erase term: with ||g||^2 > 1 + alpha it grows without bound."""
    gradient = normal(4, 6)
    gradient *= 2.0 / torch.linalg.matrix_norm(gradient, 2)
    literal, default = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(4, 6, dtype=torch.float64)
    for _ in range(60):
        delta_write_(literal, gradient, 0.9, 1.0, literal=True)
        delta_write_(default, gradient, 0.9, 1.0)
    assert float(literal.norm()) > 1e20
    assert float(default.norm()) < float(gradient.norm()) / (1 - 0.9)


def test_delta_momentum_follows_the_gradients_scale() -> None:
    small, large = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(4, 6, dtype=torch.float64)
    for seed in range(5):
        delta_write_(small, normal(4, 6, seed=seed), 0.9, 1.0)
        delta_write_(large, 1e3 * normal(4, 6, seed=seed), 0.9, 1.0)
    assert torch.allclose(large, 1e3 * small, rtol=1e-10, atol=0)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (3, 4, 6)], ids=str)
def test_a_linear_dot_memory_through_newton_schulz_is_muon(shape: Any) -> None:
    """Check 21: DMGD with a linear memory, the dot objective and Newton-Schulz as output = Muon, step by step."""
    ours, theirs, gradients = (
        Parameter(normal(*shape)),
        Parameter(normal(*shape)),
        [normal(*shape, seed=s) for s in range(9)],
    )
    expected = run(Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.1), theirs, gradients)
    kind: Dict[str, Any] = {"memory": "linear", "objective": "dot", "output": "newton_schulz"}
    found = run(DeepMomentum([ours], lr=0.1, momentum=0.9, weight_decay=0.1, **kind), ours, gradients)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found, expected, strict=True))


def test_a_linear_memory_is_momentum_or_delta_momentum() -> None:
    """Eq. 33 and Eq. 49 as the two objectives of a linear memory with the identity as output."""
    gradients = [normal(4, 6, seed=s) for s in range(9)]
    for objective, erase in (("dot", 0.0), ("l2", 0.6)):
        ours, theirs = Parameter(normal(4, 6)), Parameter(normal(4, 6))
        deep = DeepMomentum([ours], lr=0.1, memory="linear", objective=objective, output="identity", erase=0.6)
        found = run(deep, ours, gradients)
        expected = run(DeltaMomentum([theirs], lr=0.1, erase=erase), theirs, gradients)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("objective", ["dot", "l2"])
def test_the_mlp_memory_descends_its_objective(objective: str) -> None:
    """Eq. 50: m = alpha m - grad L2(m; u), with the gradient taken by autograd."""
    outer, inner, (key, _) = 0.3 * normal(6, 6), 0.3 * normal(6, 6, seed=1), unit_rows(normal(4, 6, seed=2))
    leaves = [outer.clone().requires_grad_(), inner.clone().requires_grad_()]
    output = recall(leaves[0], leaves[1], key)
    loss = -(output * key).sum() if objective == "dot" else (output - key).square().sum() / 2
    gradients = torch.autograd.grad(loss / 4, leaves)
    memorise_(outer, inner, key, 0.9, 0.0 if objective == "dot" else 1.0)
    for leaf, gradient, found in zip(leaves, gradients, (outer, inner), strict=True):
        assert torch.allclose(found, 0.9 * leaf.detach() - gradient, rtol=0, atol=1e-12)


def test_the_mlp_memory_recalls_what_it_was_shown() -> None:
    """With l2 and no forgetting, m(u) tends to u for gradients seen often: the memory is faithful."""
    keys = [unit_rows(normal(4, 8, seed=s))[0] for s in range(2)]
    outer, inner = torch.zeros(8, 8, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64)
    first = [float((recall(outer, inner, key) - key).norm()) for key in keys]
    for _ in range(300):
        for key in keys:
            memorise_(outer, inner, key, 1.0, 1.0)
    last = [float((recall(outer, inner, key) - key).norm()) for key in keys]
    assert max(last) < 0.05 * min(first)


@pytest.mark.parametrize("seed", range(5))
def test_the_first_dot_step_descends(seed: int) -> None:
    """<m(u), u> is a sum over the product of two positive semi-definite matrices."""
    weight, gradient = Parameter(normal(5, 7)), normal(5, 7, seed=seed)
    run(DeepMomentum([weight], lr=1.0, objective="dot", output="identity"), weight, [gradient])
    assert float(((weight.detach() - normal(5, 7)) * gradient).sum()) < 0


@pytest.mark.parametrize(("output", "factor"), [("identity", 10.0), ("newton_schulz", 1.0)])
def test_scale_of_the_mlp_memorys_step(output: str, factor: float) -> None:
    """With the identity steps follow the gradients' scale, with Newton-Schulz they do not depend on it."""
    moved = []
    for scale in (1.0, 10.0):
        weight = Parameter(torch.zeros(4, 6, dtype=torch.float64))
        run(DeepMomentum([weight], lr=0.1, output=output), weight, [scale * normal(4, 6, seed=s) for s in range(5)])
        moved.append(weight.detach())
    assert torch.allclose(moved[1], factor * moved[0], rtol=0, atol=1e-8)
