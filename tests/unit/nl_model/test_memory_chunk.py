"""The chunk products against the token rule, and what single rules recall when one pair is written again and again."""

from __future__ import annotations

from typing import Tuple

import pytest
import torch
from torch import Tensor

from nl_model.memory.chunk import delta_chunk, gates, momentum_chunk
from nl_model.memory.config import MemoryConfig
from nl_model.memory.reference import token_write

K = 8
ONE, NONE = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)


@pytest.fixture
def pair() -> Tuple[Tensor, Tensor]:
    """A unit key and a value."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.empty(2, K, dtype=torch.float64).normal_(generator=generator)
    return k / k.norm(), v


def repeat(cfg: MemoryConfig, pair: Tuple[Tensor, Tensor], writes: int, eta: float = 0.1, chunk: int = 1) -> Tensor:
    """Write a pair again and again at alpha = 1; what is recalled at the end of every chunk, in units of the value."""
    k, v = pair
    state_NKO, recalled = torch.zeros(1, K, K, dtype=torch.float64), []
    keys_NCK = k.expand(1, chunk, K)
    gate = gates(torch.full((1, chunk), eta, dtype=torch.float64), torch.zeros(1, chunk, dtype=torch.float64))
    for _ in range(writes // chunk):
        missing = v - k @ state_NKO[0] if cfg.objective == "l2" else v
        values_NCO = (cfg.gain * missing).expand(1, chunk, K)
        state_NKO = delta_chunk(state_NKO, keys_NCK, values_NCO, gate, erase=cfg.dgd)[1]
        recalled.append(torch.dot(k @ state_NKO[0], v) / torch.dot(v, v))
    return torch.stack(recalled)


def draw(T: int, seed: int = 0) -> Tuple[Tensor, ...]:
    """Unit keys, values, queries, steps and log gates of two streams."""
    generator = torch.Generator().manual_seed(seed)
    k, v, q = torch.empty(3, 2, T, K, dtype=torch.float64).normal_(generator=generator)
    eta, alpha = torch.empty(2, 2, T, dtype=torch.float64).uniform_(0.05, 0.95, generator=generator)
    return k / k.norm(dim=-1, keepdim=True), v, q, eta, alpha.log()


@pytest.mark.parametrize("erase", [True, False])
def test_a_piece_equals_its_tokens_one_by_one(erase: bool) -> None:
    k, v, q, eta, log_alpha = draw(33)
    state = torch.randn(2, K, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reads, end = delta_chunk(state, k, v, gates(eta, log_alpha), q, erase)
    assert reads is not None
    M = state.mT
    for t in range(33):
        assert torch.allclose(reads[:, t], torch.einsum("nok,nk->no", M, q[:, t]), rtol=0, atol=1e-12)
        factor = log_alpha[:, t].exp()[:, None, None] * torch.eye(K)
        outer = eta[:, t, None, None] * torch.einsum("nj,nk->njk", k[:, t], k[:, t])
        M = M @ (factor - outer if erase else factor) + torch.einsum("n,no,nk->nok", eta[:, t], v[:, t], k[:, t])
    assert torch.allclose(end.mT, M, rtol=0, atol=1e-12)


def test_momentum_of_zero_decay_is_no_momentum() -> None:
    k, v, q, eta, log_alpha = draw(20)
    state, gate = torch.ones(2, K, K, dtype=torch.float64), gates(eta, log_alpha)
    theta = torch.full((2,), 1e-300, dtype=torch.float64)
    reads, end, _ = momentum_chunk(state, torch.zeros_like(state), theta, k, v, None, gate, q)
    plain_reads, plain_end = delta_chunk(state, k, v, gate, q)
    assert reads is not None and plain_reads is not None
    assert torch.allclose(reads, plain_reads, rtol=0, atol=1e-12) and torch.allclose(end, plain_end, rtol=0, atol=1e-12)


def test_strong_decay_stays_finite_in_float32() -> None:
    """Cumulative decays far below the smallest float32: only their ratios are formed."""
    k, v, q, eta, _ = draw(128)
    state = torch.ones(2, K, K, dtype=torch.float64)
    log_alpha = torch.full((2, 128), -30.0, dtype=torch.float64)
    single = [x.float().requires_grad_() for x in (state, k, v, eta, log_alpha, q)]
    reads, end = delta_chunk(*single[:3], gates(*single[3:5]), single[5])
    assert reads is not None
    (reads.sum() + end.sum()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in single)
    for t in range(128):  # float64, token by token
        state = delta_chunk(state, k[:, t : t + 1], v[:, t : t + 1], gates(eta[:, t : t + 1], log_alpha[:, t : t + 1]))[
            1
        ]
    assert torch.allclose(end.double(), state, rtol=0, atol=1e-5)


def test_gated_delta_rule(pair: Tuple[Tensor, Tensor]) -> None:
    """Check 14: dot with dgd, a unit key and alpha = 1 give M + eta (v - M k) k^T."""
    k, v = pair
    M = torch.randn(K, K, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    eta = torch.full((1, 1), 0.3, dtype=torch.float64)
    (written,), _ = token_write((M,), (M,), (M,), (), k, v, eta, ONE, NONE, MemoryConfig())
    expected = M + 0.3 * torch.outer(v - M @ k, k)
    assert torch.allclose(written, expected, rtol=0, atol=1e-12)
    end = delta_chunk(M.mT[None], k[None, None], v[None, None], gates(eta, NONE))[1]
    assert torch.allclose(end[0].mT, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 16, 64, 256])
def test_gated_delta_rule_recalls_in_full(pair: Tuple[Tensor, Tensor], chunk: int) -> None:
    """Check 14: repeated writes recall 1.0, stable for every chunk length."""
    recalled = repeat(MemoryConfig(), pair, 1024, chunk=chunk)
    assert abs(recalled[-1] - 1) < 1e-9 and recalled.max() < 1 + 1e-12


@pytest.mark.parametrize(("factor", "recall"), [(1, 0.5), (2, 2 / 3)])
def test_literal_l2_with_dgd_recalls_half(pair: Tuple[Tensor, Tensor], factor: int, recall: float) -> None:
    """Check 15: Eq. 93 erases twice; repeated writes converge to 1/2, to 2/3 with the factor 2 of the squared norm."""
    recalled = repeat(MemoryConfig(objective="l2", factor=factor), pair, 1024)
    assert abs(recalled[-1] - recall) < 1e-9


def test_literal_l2_with_dgd_swings_in_chunks(pair: Tuple[Tensor, Tensor]) -> None:
    """Check 15: with frozen gradients it stores the value, then nothing, then the value."""
    recalled = repeat(MemoryConfig(objective="l2"), pair, 4 * 64, chunk=64)
    assert torch.allclose(recalled, torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64), atol=0.01)


def test_plain_delta_rule_recalls_in_full_but_not_in_chunks(pair: Tuple[Tensor, Tensor]) -> None:
    cfg = MemoryConfig(objective="l2", dgd=False)
    assert abs(repeat(cfg, pair, 1024)[-1] - 1) < 1e-9
    assert repeat(cfg, pair, 64 * 8, chunk=64)[-1].abs() > 100, "eta * C > 2 diverges"


def test_literal_sign_stores_minus_the_value(pair: Tuple[Tensor, Tensor]) -> None:
    assert abs(repeat(MemoryConfig(sign="literal"), pair, 1024)[-1] + 1) < 1e-9


@pytest.mark.parametrize("momentum", [True, False])
def test_no_step_and_no_decay_change_nothing(momentum: bool) -> None:
    """Check 17: alpha = 1 and eta = 0 leave a memory as it is."""
    k, v, _, eta, _ = draw(16)
    state = torch.randn(2, K, K, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gate, theta = gates(torch.zeros_like(eta), torch.zeros_like(eta)), torch.full((2,), 0.5, dtype=torch.float64)
    if momentum:
        end = momentum_chunk(state, torch.zeros_like(state), theta, k, v, None, gate)[1]
    else:
        end = delta_chunk(state, k, v, gate)[1]
    assert torch.equal(end, state)
