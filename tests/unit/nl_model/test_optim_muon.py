"""Newton-Schulz, Muon, and AdamW as Muon uses it for what is not a matrix; in float64."""

from __future__ import annotations

from typing import List, Tuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from nl_model.optim.adamw import adamw_
from nl_model.optim.muon import QUINTIC, Muon, newton_schulz
from nl_model.optim.registry import lookup_tables


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def conditioned(rows: int, columns: int, smallest: float) -> Tensor:
    """A random matrix with singular values from `smallest` to 1, evenly spaced."""
    left, _, right = torch.linalg.svd(normal(rows, columns, seed=rows), full_matrices=False)
    return left @ torch.diag(torch.linspace(smallest, 1.0, min(rows, columns), dtype=torch.float64)) @ right


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (32, 32), (16, 64)], ids=str)
def test_singular_values_end_near_one(shape: Tuple[int, int], dtype: torch.dtype) -> None:
    """Check 19: within [0.7, 1.2] up to what the quintic itself allows, which is [0.682, 1.202]; bfloat16 adds 0.02."""
    slack = 0.02 if dtype == torch.bfloat16 else 1e-3
    for smallest in (0.1, 0.5, 1.0):
        y = newton_schulz(conditioned(*shape, smallest).to(dtype))
        assert y.dtype == dtype
        values = torch.linalg.svdvals(y.double())
        assert 0.6818 - slack < float(values.min()) and float(values.max()) < 1.2025 + slack


def test_the_range_of_the_quintic() -> None:
    """Check 19: between its extrema the polynomial stays in the range that the docstring gives."""
    a, b, c = QUINTIC
    s = torch.linspace(0.554, 1.203, 10_001, dtype=torch.float64)
    value = a * s + b * s**3 + c * s**5
    assert float(value.min()) == pytest.approx(0.6819, abs=1e-4)
    assert float(value.max()) == pytest.approx(1.2024, abs=1e-4)


def test_singular_vectors_stay() -> None:
    x = conditioned(6, 9, 0.2)
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = QUINTIC[0] * values + QUINTIC[1] * values**3 + QUINTIC[2] * values**5
    assert torch.allclose(newton_schulz(x), left @ torch.diag(values) @ right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_scale_does_not_matter(scale: float) -> None:
    x = normal(5, 7, dtype=torch.float32)
    assert torch.allclose(newton_schulz(x * scale), newton_schulz(x), rtol=0, atol=1e-4)


def test_zero_stays_zero() -> None:
    assert torch.equal(newton_schulz(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (3, 2, 7, 5)], ids=str)
def test_leading_dimensions_are_a_batch(shape: Tuple[int, ...]) -> None:
    x = normal(*shape)
    apart = torch.stack([torch.stack([newton_schulz(m) for m in row]) for row in x])
    assert torch.allclose(newton_schulz(x), apart, rtol=0, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_three_steps_by_hand(nesterov: bool) -> None:
    weight, gradients = Parameter(normal(6, 3)), [normal(6, 3, seed=s) for s in (1, 2, 3)]
    expected, momentum = weight.detach().clone(), torch.zeros(6, 3, dtype=torch.float64)
    optimizer = Muon([weight], lr=0.1, momentum=0.8, nesterov=nesterov, weight_decay=0.5)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.8 * momentum + gradient
        ahead = gradient + 0.8 * momentum if nesterov else momentum
        expected = expected * 0.95 - 0.1 * 2**0.5 * newton_schulz(ahead)
    assert torch.allclose(weight, expected, rtol=0, atol=1e-12)


def adamw_runs(steps: int = 12, dtype: torch.dtype = torch.float64) -> Tuple[Tensor, Tensor]:
    """The same gradients through our update of one parameter and through torch's AdamW."""
    ours, theirs = Parameter(normal(5, dtype=dtype)), Parameter(normal(5, dtype=dtype))
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer = Muon([ours], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, adamw_scale=0.1)
    for step in range(steps):
        ours.grad = normal(5, seed=step, dtype=dtype)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    return ours.detach(), theirs.detach()


def test_vectors_go_to_adamw() -> None:
    """Check 2: what Muon leaves to AdamW is written as torch's AdamW writes it, to 1e-12."""
    ours, theirs = adamw_runs()
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    assert float((ours - normal(5)).abs().max()) > 1e-2


def test_moments_of_bfloat16_weights_are_float32() -> None:
    weight = Parameter(normal(5, dtype=torch.bfloat16))
    weight.grad = normal(5, seed=1, dtype=torch.bfloat16)
    optimizer = Muon([weight])
    optimizer.step()
    assert {value.dtype for value in optimizer.state[weight].values()} == {torch.float32}
    assert weight.dtype == torch.bfloat16


def test_embeddings_and_heads_go_to_adamw() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "up": nn.Linear(4, 5), "head": nn.Linear(5, 7)})
    optimizer = Muon(model.parameters(), others=lookup_tables(model))
    by_kind = {group["matrix"]: {id(p) for p in group["params"]} for group in optimizer.param_groups}
    up = model["up"]
    assert by_kind[True] == {id(up.weight)}
    assert len(by_kind[False]) == 4 and id(up.bias) in by_kind[False]


def test_flat_shards_are_refused() -> None:
    optimizer = Muon([Parameter(normal(4, 4))])
    shard = Parameter(normal(16))
    shard.grad = normal(16)
    optimizer.param_groups[0]["params"] = [shard]
    with pytest.raises(ValueError, match="flat shard of 16 numbers; use adamw"):
        optimizer.step()


def regression_optimum(gradients: List[Tensor], weights: Tensor, target: Tensor, ridge: float) -> Tensor:
    """Element by element, the m that minimises sum_i w_i (m g_i - target)^2 + ridge m^2, by least squares."""
    found = []
    for column, value in zip(torch.stack(gradients).T, target, strict=True):
        design = torch.cat((weights.sqrt() * column, torch.tensor([ridge], dtype=torch.float64).sqrt()))
        wanted = torch.cat((weights.sqrt() * value, torch.zeros(1, dtype=torch.float64)))
        found.append(torch.linalg.lstsq(design[:, None], wanted[:, None]).solution[0, 0])
    return torch.stack(found)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_the_optimal_elementwise_memory(ridge: float) -> None:
    """Appendix B, Eq. 101 to 105: m* = (H + ridge)^-1 M P, and with P = H and no ridge it is plain momentum M."""
    gradients = [normal(6, seed=s) for s in range(9)]
    weights = 0.9 ** torch.arange(8, -1, -1, dtype=torch.float64)
    M = sum((w * g for w, g in zip(weights, gradients, strict=True)), torch.zeros(6, dtype=torch.float64))
    H = sum((w * g**2 for w, g in zip(weights, gradients, strict=True)), torch.zeros(6, dtype=torch.float64))
    target = normal(6, seed=99)
    found = regression_optimum(gradients, weights, target, ridge)
    assert torch.allclose(found, M * target / (H + ridge), rtol=1e-10, atol=1e-12)
    if ridge == 0.0:
        assert torch.allclose(regression_optimum(gradients, weights, H, 0.0), M, rtol=1e-10, atol=1e-12)


def test_adam_is_the_optimum_of_an_elementwise_regression_memory() -> None:
    """Appendix B: with P = sqrt(H), the gradients' root mean square, the optimal memory is Adam's direction."""
    gradients, beta = [normal(6, seed=s) for s in range(9)], 0.9
    parameter, state = Parameter(torch.zeros(6, dtype=torch.float64)), {}
    for gradient in gradients:
        before = parameter.detach().clone()
        parameter.grad = gradient
        with torch.no_grad():
            adamw_(parameter, state, 1.0, (beta, beta), 0.0, 0.0)
    weights = beta ** torch.arange(8, -1, -1, dtype=torch.float64)
    weights = weights / weights.sum()
    deviation = (weights[:, None] * torch.stack(gradients) ** 2).sum(0).sqrt()
    memory = regression_optimum(gradients, weights, deviation, 0.0)
    assert torch.allclose(before - parameter.detach(), memory, rtol=1e-10, atol=1e-12)
