"""Divergences against their definitions, written out in float64, and their gradients against finite differences."""

from __future__ import annotations

import math
from functools import partial
from typing import Callable, Dict

import pytest
import torch
from torch import Tensor

from nl_model.config import DIVERGENCES
from nl_model.distillation import (
    TopK,
    distillation,
    divergence,
    forward_kl,
    reverse_kl,
    top_k,
)

B, T, V = 2, 3, 7


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.randn(B, T, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    return drawn.to(dtype)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def by_definition(student: Tensor, teacher: Tensor, kind: str, beta: float) -> Tensor:
    q, p = student.softmax(-1), teacher.softmax(-1)
    if kind == "forward_kl":
        return kl(p, q)
    if kind == "reverse_kl":
        return kl(q, p)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


CASES = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]
cases = pytest.mark.parametrize(("kind", "beta"), CASES)


@cases
def test_values_are_those_of_the_definition(kind: str, beta: float) -> None:
    student, teacher = logits(1), logits(2)
    expected = by_definition(student, teacher, kind, beta)
    found = divergence(student, teacher, kind, beta)
    assert found.shape == (B, T) and found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    single = divergence(student.float(), teacher.float(), kind, beta)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-6)
    assert divergence(student.bfloat16(), teacher.bfloat16(), kind, beta).dtype == torch.float32


def test_the_three_have_their_directions() -> None:
    student, teacher = logits(1), logits(2)
    torch.testing.assert_close(reverse_kl(student, teacher), forward_kl(teacher, student))
    assert not torch.allclose(forward_kl(student, teacher), reverse_kl(student, teacher))
    jensen_shannon = partial(divergence, kind="jsd")
    torch.testing.assert_close(jensen_shannon(student, teacher), jensen_shannon(teacher, student))
    assert float(jensen_shannon(100 * student, 100 * teacher).max()) <= math.log(2) + 1e-12
    small = 1e-6
    for beta, limit in ((small, forward_kl), (1 - small, reverse_kl)):
        found = jensen_shannon(student, teacher, beta=beta) / small
        torch.testing.assert_close(found, limit(student, teacher), rtol=1e-3, atol=1e-4)


@cases
@pytest.mark.parametrize("k", [0, 1, 3, V])
def test_gradients_match_finite_differences_and_reach_the_student_alone(kind: str, beta: float, k: int) -> None:
    teacher = logits(2).requires_grad_()
    guide = top_k(teacher, k) if k else teacher
    student = logits(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: divergence(x, guide, kind, beta), student)
    divergence(student, guide, kind, beta).sum().backward()
    assert teacher.grad is None and student.grad is not None
    assert float(student.grad.sum(-1).abs().max()) < 1e-12, "a constant does not change a distribution"


def test_the_gradient_of_forward_kl_is_the_difference_of_the_probabilities() -> None:
    student, teacher = logits(1).requires_grad_(), logits(2)
    forward_kl(student, teacher).sum().backward()
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1))
    half = logits(1, torch.bfloat16).requires_grad_()
    forward_kl(half, teacher).sum().backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16


@cases
def test_equal_distributions_do_not_diverge(kind: str, beta: float) -> None:
    same = logits(1)
    for guide in (same, top_k(same, 3)):
        assert float(divergence(same + 2.0, guide, kind, beta).abs().max()) < 1e-12
    single = same.float()
    assert torch.equal(forward_kl(single, single), torch.zeros(B, T))


@cases
def test_all_tokens_named_is_the_full_divergence(kind: str, beta: float) -> None:
    results = []
    teacher = logits(2)
    for guide in (teacher, top_k(teacher, V), top_k(teacher, V + 9)):
        student = logits(1).requires_grad_()
        value = divergence(student, guide, kind, beta)
        (gradient,) = torch.autograd.grad(value.square().sum(), student)
        results.append((value, gradient))
    for value, gradient in results[1:]:
        torch.testing.assert_close(value, results[0][0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-12, atol=1e-12)


@cases
def test_the_tail_as_one_bucket_is_a_lower_bound_that_rises_with_k(kind: str, beta: float) -> None:
    for seed in range(20):
        student, teacher = logits(seed), logits(100 + seed)
        full = divergence(student, teacher, kind, beta)
        below = torch.zeros_like(full)
        for k in range(1, V + 1):
            found = divergence(student, top_k(teacher, k), kind, beta)
            assert bool((found >= below - 1e-12).all()), "naming one more token refines the buckets"
            assert bool((found <= full + 1e-12).all())
            below = found


@cases
def test_top_k_is_the_divergence_of_the_buckets(kind: str, beta: float) -> None:
    student, teacher, k = logits(1), logits(2), 3
    guide = top_k(teacher, k)
    assert guide.ids_TK.dtype == torch.int64 and guide.ids_TK.shape == (B, T, k) and guide.log_tail_T.shape == (B, T)
    merged: Dict[str, Tensor] = {}
    for name, values in (("student", student), ("teacher", teacher)):
        named = values.softmax(-1).gather(-1, guide.ids_TK)
        merged[name] = torch.cat((named, 1 - named.sum(-1, keepdim=True)), -1).log()
    expected = by_definition(merged["student"], merged["teacher"], kind, beta)
    torch.testing.assert_close(divergence(student, guide, kind, beta), expected)


def test_what_was_rounded_to_be_stored_is_a_distribution_again() -> None:
    teacher = logits(2, torch.float32)
    exact = top_k(teacher, 4)
    stored = TopK(exact.ids_TK, exact.log_p_TK.half(), exact.log_tail_T.half())
    found = forward_kl(teacher, stored)
    assert float(found.min()) > -1e-6 and float(found.max()) < 1e-5
    every = top_k(teacher, V)
    assert bool((every.log_tail_T == -torch.inf).all())
    halves = TopK(every.ids_TK, every.log_p_TK.half(), every.log_tail_T.half())
    assert bool(forward_kl(logits(1, torch.float32), halves).isfinite().all())
    mask = torch.tensor([True, False])
    assert torch.equal(exact[mask].ids_TK, exact.ids_TK[:1])


@pytest.mark.parametrize("k", [0, 2])
def test_inputs_stay_and_nothing_is_kept_without_a_gradient(k: int) -> None:
    for kind in DIVERGENCES:
        student, teacher = logits(1), logits(2)
        before = student.clone(), teacher.clone()
        guide = top_k(teacher, k) if k else teacher
        value = divergence(student, guide, kind)
        assert torch.equal(student, before[0]) and torch.equal(teacher, before[1]) and value.grad_fn is None
        again = divergence(student, guide, kind)
        assert torch.equal(value, again), "the guide can be used again"


def test_one_tensor_of_the_logits_shape_is_kept_for_the_gradient() -> None:
    sizes = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    calls: Dict[str, Callable[[Tensor], Tensor]] = {
        kind: partial(divergence, guide=logits(2), kind=kind) for kind in DIVERGENCES
    }
    calls["top"] = partial(divergence, guide=top_k(logits(2), 2))
    for call in calls.values():
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            call(logits(1).requires_grad_())
        assert sizes == [B * T * V]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"kind": "kl"}, "divergence='kl' is unknown; use one of forward_kl"), ({"beta": 1.0}, r"beta=1.0 must lie in")],
)
def test_what_is_no_divergence_is_refused(settings: Dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        divergence(logits(1), logits(2), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_distillation_mixes_truth_and_teacher(weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    nll, taught = torch.rand(B, T, generator=generator), torch.rand(B, T, generator=generator)
    mixed = distillation(nll, taught, weight)
    if weight == 0.0:
        assert torch.equal(mixed, nll)
    elif weight == 1.0:
        assert torch.equal(mixed, taught)
    else:
        assert torch.allclose(mixed, 0.75 * nll + 0.25 * taught)
