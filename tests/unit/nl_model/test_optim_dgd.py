"""Delta gradient descent against the proximal problems that define it, in float64."""

from __future__ import annotations

import copy
import gc
from typing import Tuple

import pytest
import torch
from torch import Tensor, nn

from nl_model.optim.dgd import DGD, dgd_direction, dgd_step

LR = 0.3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solved(weight: Tensor, x: Tensor, u: Tensor, lr: float) -> Tensor:
    """argmin_W 1/2 sum_n ||W x_n - u_n||^2 + 1/(2 lr) ||W - W_t||^2, row by row as one least-squares problem."""
    inputs = weight.size(1)
    design = torch.cat((x, torch.eye(inputs, dtype=x.dtype) / lr**0.5))
    return torch.linalg.lstsq(design, torch.cat((u, weight.T / lr**0.5))).solution.T


@pytest.mark.parametrize("length", [0.5, 1.0, 1.7])
def test_closed_form_solves_the_proximal_problem(length: float) -> None:
    """Check 18: eta / (1 + eta lambda^2) is the step of the argmin for inputs of norm 0.5, 1 and 1.7, to 1e-12."""
    weight, gradient, x = normal(4, 6), normal(4, seed=1), normal(6, seed=2)
    x = length * x / x.norm()
    ours = dgd_step(weight, x, gradient, LR)
    assert torch.allclose(ours, solved(weight, x[None], -gradient[None], LR), rtol=0, atol=1e-12)
    printed = weight - LR / (1 + LR) * torch.outer(weight @ x + gradient, x)
    assert torch.allclose(ours, printed, rtol=0, atol=1e-12) == (length == 1.0), "Eq. 57 is the case of unit inputs"


def test_nothing_to_erase_is_gradient_descent() -> None:
    """Check 18: where W_t x = 0 the step goes along the gradient."""
    x, gradient = normal(6, seed=2), normal(4, seed=1)
    weight = normal(4, 6) @ (torch.eye(6, dtype=torch.float64) - torch.outer(x, x) / x.dot(x))
    moved = dgd_step(weight, x, gradient, LR) - weight
    assert torch.allclose(moved, -LR / (1 + LR * x.dot(x)) * torch.outer(gradient, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("samples", [1, 3, 50])
def test_samples_are_reduced_by_solving_their_problem(samples: int) -> None:
    """Check 18, for N samples: the batched rule is the argmin of the summed objective; N = 1 is the closed form."""
    weight, x, gradient = normal(4, 6), normal(samples, 6, seed=1), normal(samples, 4, seed=2)
    direction = dgd_direction(weight, gradient.T @ x, x.T @ x, LR)
    assert torch.allclose(weight - LR * direction, solved(weight, x, -gradient, LR), rtol=0, atol=1e-12)
    if samples == 1:
        ours = dgd_step(weight, x[0], gradient[0], LR)
        assert torch.allclose(weight - LR * direction, ours, rtol=0, atol=1e-12)


def test_a_large_step_forgets_the_start_and_stays_finite() -> None:
    """The proximal form is stable for any lr: it ends at the regression's own solution."""
    weight, x, u = normal(4, 6), normal(50, 6, seed=1), normal(50, 4, seed=2)
    moved = weight - 1e9 * dgd_direction(weight, -u.T @ x, x.T @ x, 1e9)
    assert torch.allclose(moved, torch.linalg.lstsq(x, u).solution.T, rtol=0, atol=1e-6)


def test_float32_is_enough_for_inputs_of_the_usual_size() -> None:
    """A rank-deficient Gram matrix with lr ||A|| = 100; one of 1e9 is refused with a remedy."""
    weight, x, gradient = normal(32, 64), normal(3, 64, seed=1), normal(3, 32, seed=2)
    gram = 100 * x.T @ x / torch.linalg.matrix_norm(x, 2) ** 2
    exact = dgd_direction(weight, gradient.T @ x, gram, 1.0)
    found = dgd_direction(weight.float(), (gradient.T @ x).float(), gram.float(), 1.0)
    assert float((found - exact).norm() / exact.norm()) < 1e-4
    for wrong in (1e7 * gram.float(), gram.float() * float("nan")):
        with pytest.raises(ValueError, match=r"use a smaller optimizer\.lr or erase"):
            dgd_direction(weight.float(), (gradient.T @ x).float(), wrong, 1.0)


def test_a_batch_of_layers_is_as_many_layers() -> None:
    weight, x, gradient = normal(3, 4, 6), normal(3, 6, seed=1), normal(3, 4, seed=2)
    each = [dgd_step(w, i, g, LR) for w, i, g in zip(weight, x, gradient, strict=True)]
    assert torch.allclose(dgd_step(weight, x, gradient, LR), torch.stack(each), rtol=0, atol=1e-12)
    gram, outer = x[..., None] * x[:, None], gradient[..., None] * x[:, None]
    moved = weight - LR * dgd_direction(weight, outer, gram, LR)
    assert torch.allclose(moved, torch.stack(each), rtol=0, atol=1e-12)


def network(bias: bool = False) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 4, bias=bias)).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=10 + number))
    return model


def captured(model: nn.Sequential, x: Tensor, y: Tensor) -> Tuple[Tensor, Tensor]:
    """Inputs and output gradients of the last layer for the summed squared error."""
    hidden = model[1](model[0](x)).detach()
    return hidden, 2 * (model[2](hidden) - y).detach()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("parts", [1, 3], ids=["one backward", "three backwards"])
def test_the_optimizer_sees_its_layers_inputs(reduction: str, parts: int) -> None:
    """A write over several backward passes is the argmin over all their samples."""
    model, x, y = network(), normal(4, 3, 6, seed=1), normal(4, 3, 4, seed=2)
    optimizer = DGD(model.parameters(), model, lr=LR, reduction=reduction)
    divisor = 12 if reduction == "mean" else 1
    hidden, gradient = captured(model, x.view(12, 6), y.view(12, 4))
    weight = model[2].weight.detach().clone()
    for x_part, y_part in zip(x.split(4 // parts + 1), y.split(4 // parts + 1), strict=True):
        model(x_part)  # a forward pass alone leaves no trace
        with torch.no_grad():
            model(x_part)
        ((model(x_part) - y_part).square().sum() / divisor).backward()
    optimizer.step()
    size = divisor**-0.5
    expected = solved(weight, hidden * size, -gradient * size, LR)
    assert torch.allclose(model[2].weight, expected, rtol=0, atol=1e-12)


def test_without_erasing_it_is_gradient_descent() -> None:
    model, other = network(bias=True), network(bias=True)
    ours = DGD(model.parameters(), model, lr=0.1, erase=0.0, weight_decay=0.0)
    theirs = torch.optim.SGD(other.parameters(), lr=0.1)
    for net, optimizer in ((model, ours), (other, theirs)):
        for step in range(3):
            optimizer.zero_grad()
            net(normal(7, 6, seed=step)).square().mean().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_missing_inputs_are_named() -> None:
    model = network()
    model(normal(2, 6)).sum().backward()
    optimizer = DGD(model.parameters(), model)
    with pytest.raises(ValueError, match="saw no inputs of its layer; build the optimizer before the forward pass"):
        optimizer.step()
    model(normal(2, 6)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="run a backward pass between two writes"):
        optimizer.step()


def test_matrices_without_a_layer_are_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"shape \(3, 3\) belongs to no nn.Linear"):
        DGD([nn.Parameter(normal(3, 3))], model)


def test_forgetting_gradients_forgets_inputs() -> None:
    model = network()
    optimizer = DGD(model.parameters(), model)
    model(normal(2, 6)).sum().backward()
    assert int(optimizer.state[model[0].weight]["samples"]) == 2
    optimizer.zero_grad()
    model(normal(3, 6)).sum().backward()
    assert int(optimizer.state[model[0].weight]["samples"]) == 3


def test_copies_and_the_dead_do_not_observe() -> None:
    model = network()
    optimizer = DGD(model.parameters(), model)
    twin = copy.deepcopy(model)
    twin(normal(2, 6)).sum().backward()
    assert not optimizer.state
    del optimizer
    gc.collect()
    assert not model[0]._forward_hooks
    model(normal(2, 6)).sum().backward()


def test_inputs_in_low_precision_are_summed_in_float32() -> None:
    model = network().float()
    optimizer = DGD(model.parameters(), model)
    with torch.autocast("cpu", torch.bfloat16):
        model(normal(300, 6).float()).sum().backward()
    state = optimizer.state[model[2].weight]
    assert state["gram"].dtype == torch.float32 and int(state["samples"]) == 300
    optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
