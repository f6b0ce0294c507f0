"""Self-modifying Titans against the token rule, and as a stateful causal mixer."""

from __future__ import annotations

import itertools
import math
from typing import Any, List

import pytest
import torch
from torch import Tensor

from nl_model.memory.config import MemoryConfig
from nl_model.memory.reference import reference_forward
from nl_model.memory.state import MemoryState
from nl_model.memory.titans import SelfModifyingTitans

D, H, T = 12, 2, 20
RULES = [
    {"objective": objective, "dgd": dgd, "layers": layers, "momentum": momentum}
    for objective, dgd, layers, momentum in itertools.product(("dot", "l2"), (True, False), (1, 2), (False, True))
]
KINDS = [{"layers": 1}, {"layers": 1, "momentum": True}, {"layers": 2, "objective": "l2"}]


def name_of(rule: dict[str, Any]) -> str:
    return "-".join(key if value is True else str(value) for key, value in rule.items() if value is not False)


def build(dtype: torch.dtype = torch.float64, noise: float = 0.1, **values: Any) -> SelfModifyingTitans:
    """A mixer with every parameter moved off its start."""
    cfg = MemoryConfig(**{"chunk": 4, "mem_chunk": 4, "eta_max": 0.05 if values.get("layers") == 2 else 1.0, **values})
    module, generator = SelfModifyingTitans(D, H, cfg), torch.Generator().manual_seed(0)
    module.reset_parameters(generator)
    module.to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, dtype=dtype, generator=generator))
    return module


def inputs(tokens: int = T, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, tokens, D, dtype=dtype, generator=torch.Generator().manual_seed(1))


def in_calls(module: SelfModifyingTitans, x: Tensor, sizes: List[int]) -> tuple[Tensor, MemoryState]:
    state, outputs = None, []
    for part in x.split(sizes, 1):
        y, state = module(part, state)
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, 1), state


def distance(a: MemoryState, b: MemoryState) -> float:
    flat = b.flat()
    assert a.position == b.position and a.flat().keys() == flat.keys()
    return max((tensor - flat[name]).abs().max().item() for name, tensor in a.flat().items())


@pytest.mark.parametrize("chunks", [(1, 1), (4, 4), (16, 16), (T, T), (4, 16), (16, 4), (3, 5)], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_chunk_parallel_equals_the_token_rule(rule: dict[str, Any], chunks: tuple[int, int]) -> None:
    """Check 13: outputs and memories equal the sequential rule with frozen gradients; C = 1 is the exact token rule."""
    module, x = build(chunk=chunks[0], mem_chunk=chunks[1], **rule), inputs()
    with torch.no_grad():
        y, state = module(x)
        expected, memories = reference_forward(module, x)
        mine = module.memories(state)
    assert expected.abs().max() > 0.1
    assert (y - expected).abs().max() < 1e-12
    for box, weights in memories.items():
        names = (box,) if len(weights) == 1 else (f"{box}_out", f"{box}_in")
        for name, weight in zip(names, weights, strict=True):
            assert (mine[name] - weight).abs().max() < 1e-12 * max(1.0, weight.abs().max().item()), name


@pytest.mark.parametrize(
    "values",
    [
        {"forget": "zero"},
        {"forget": "zero", "layers": 2, "objective": "l2"},
        {"forget": "zero", "momentum": True},
        {"decay": False},
        {"decay": False, "layers": 2, "objective": "l2"},
        {"sign": "literal"},
        {"objective": "l2", "factor": 2},
        {"unit_values": False},
        {"conv": 1},
        {"mix": False},
        {"layers": 2, "objective": "l2", "expansion": 3},
    ],
    ids=name_of,
)
def test_every_option_equals_the_token_rule(values: dict[str, Any]) -> None:
    """Check 13 for the options that the products must honour as well."""
    module, x = build(**values), inputs()
    with torch.no_grad():
        y, expected = module(x)[0], reference_forward(module, x)[0]
        plain = build(**{k: v for k, v in values.items() if k in ("layers", "objective")})(x)[0]
    assert (y - expected).abs().max() < 1e-12
    assert (y - plain).abs().max() > 1e-6, "the option does something"


def test_the_chunk_changes_the_model() -> None:
    x = inputs()
    with torch.no_grad():
        assert (build(chunk=1, mem_chunk=1)(x)[0] - build(chunk=16, mem_chunk=16)(x)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("chunks", [(4, 4), (4, 8), (6, 4)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_call_sizes_do_not_matter(kind: dict[str, Any], chunks: tuple[int, int]) -> None:
    """Check 5 for memories: any split of a stream gives the same outputs and state, calls may end inside a chunk."""
    module, x = build(chunk=chunks[0], mem_chunk=chunks[1], **kind), inputs()
    with torch.no_grad():
        whole, end = module(x)
        for sizes in ([1] * T, [3, 1, 6, 10], [4, 8, 8]):
            y, state = in_calls(module, x, sizes)
            assert (y - whole).abs().max() < 1e-12 and distance(state, end) < 1e-12


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_anchor_index(kind: dict[str, Any]) -> None:
    """Check 17: the anchor of token t is the state after C * floor((t - 1) / C) tokens."""
    module, x, state, C = build(**kind), inputs(9), None, 4
    running = [module.initial_state(2, torch.float64).tracks]
    with torch.no_grad():
        for t in range(1, 10):
            _, state = module(x[:, t - 1 : t], state)
            running.append(state.tracks)
            expected = running[C * (t // C)]  # of token t + 1
            for name, track in state.tracks.items():
                for key, anchor in track.anchor.items():
                    assert torch.equal(anchor, expected[name].running[key])
                    assert not torch.equal(track.running[key], running[t - 1][name].running[key])


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_no_step_and_no_decay_change_no_memory(kind: dict[str, Any]) -> None:
    """Check 17 for the whole mixer: without steps and forgetting the memories are their initial states."""
    module, x = build(decay=False, **kind), inputs()
    with torch.no_grad():
        module.bank.eta_bias.fill_(-1e4)
        memories = module.memories(module(x)[1])
    for name, initial in module.bank.initial.items():
        assert torch.equal(memories[name], initial.expand_as(memories[name])), name


def test_every_memory_makes_its_own_target() -> None:
    """Check 16: vhat_box is box's own anchor applied to v; the key memory enters no other target but through v."""
    module, x = build(decay=False), inputs(1)

    def targets() -> tuple[dict[str, Tensor], Tensor]:
        """Targets recovered from one write: M_1 k = (1 - eta) M_0 k + eta vhat; and v."""
        bank, memories = module.bank, module.memories(module(x)[1])
        x_BD = x[:, 0] * module.conv_WD[-1]
        assert module.mix is not None
        x_NCK = module._split(module.mix(x_BD)[:, None])
        start = {
            n: w.transpose(0, 1).flatten(0, 1)
            for n, w in module.initial_state(2, x.dtype).tracks["generators"].anchor.items()
        }
        tokens = bank.generate(bank.prepare(2, x.dtype), start, x_NCK)
        k, v, eta = (t.view(H, 2, -1).transpose(0, 1) for t in (tokens.k_NCK, tokens.v_NCK, tokens.eta_NC))
        found = {}
        for box, initial in bank.initial.items():
            held = torch.einsum("hok,bhk->bho", initial, k)
            found[box] = (torch.einsum("bhok,bhk->bho", memories[box], k) - (1 - eta) * held) / eta
        return found, v

    with torch.no_grad():
        before, v = targets()
        for box, initial in module.bank.initial.items():
            assert torch.allclose(before[box], torch.einsum("hok,bhk->bho", initial, v), rtol=0, atol=1e-12), box
        module.bank.initial["k"].mul_(torch.linspace(0.5, 2.0, D // H, dtype=torch.float64)[:, None])
        after, _ = targets()
    for box in ("v", "eta", "mem"):
        assert torch.allclose(before[box], after[box], rtol=0, atol=1e-12), box
    assert not torch.allclose(before["k"], after["k"], atol=1e-3)


@pytest.mark.parametrize("chunks", [(4, 4), (4, 8)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_outer_gradient(kind: dict[str, Any], chunks: tuple[int, int]) -> None:
    """Check 11: the loss reaches every parameter through all writes and matches finite differences."""
    module, x = build(chunk=chunks[0], mem_chunk=chunks[1], **kind), inputs(14)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(2, 14, D, dtype=torch.float64, generator=generator)

    def loss() -> Tensor:
        return (module(x)[0] * weight).sum()

    loss().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 1e-9, name
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        direction /= direction.norm()
        slope, step = (parameter.grad * direction).sum().item(), 1e-5
        with torch.no_grad():
            parameter.add_(step * direction)
            above = loss().item()
            parameter.sub_(2 * step * direction)
            below = loss().item()
            parameter.add_(step * direction)
        numeric = (above - below) / (2 * step)
        assert math.isclose(slope, numeric, rel_tol=1e-6, abs_tol=1e-7), (name, slope, numeric)


def test_detach_cuts_the_gradient_between_calls() -> None:
    module, x = build(), inputs()
    for cut in (False, True):
        first = x[:, :8].clone().requires_grad_()
        _, state = module(first)
        module(x[:, 8:], state.detach() if cut else state)[0].square().sum().backward()
        assert (first.grad is None) == cut


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_sequences_of_a_batch_do_not_meet(kind: dict[str, Any]) -> None:
    """Check 8 for memories: a row equals its run alone, and permuting the batch permutes outputs and states."""
    module, x, order = build(**kind), inputs(batch=3), torch.tensor([2, 0, 1])
    with torch.no_grad():
        whole, state = module(x)
        for i in range(3):
            y, alone = module(x[i : i + 1])
            assert (y[0] - whole[i]).abs().max() < 1e-10
            assert distance(alone, state.rows(torch.tensor([i]))) < 1e-10
        permuted, permuted_state = module(x[order])
    assert (permuted - whole[order]).abs().max() < 1e-10 and distance(permuted_state, state.rows(order)) < 1e-10


@pytest.mark.parametrize("chunks", [(4, 4), (4, 8)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_causality(kind: dict[str, Any], chunks: tuple[int, int]) -> None:
    """Check 6: changing token t changes no output before t and no anchor before the end of t's chunk."""
    module, x = build(chunk=chunks[0], mem_chunk=chunks[1], **kind), inputs()
    with torch.no_grad():
        before = module(x)[0]
        for t in (0, 3, 9, T - 1):
            changed = x.clone()
            changed[:, t] += 1.0
            after = module(changed)[0]
            assert torch.equal(before[:, :t], after[:, :t])
            assert ((before[:, t:] - after[:, t:]).abs().amax(-1) > 0).all()
            end = t // 4 * 4 + 3
            old, new = (module(y[:, :end])[1].tracks["generators"].anchor for y in (x, changed))
            assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize(
    "values",
    [{}, {"objective": "l2"}, {"forget": "zero"}, {"mem_chunk": 32}, {"momentum": True}, KINDS[2]],
    ids=name_of,
)
def test_ten_thousand_tokens_stay_finite(values: dict[str, Any]) -> None:
    """A long stream in float32, in calls of odd size: finite, bounded, of fixed size, still attentive at its end."""
    module = build(torch.float32, noise=0.3, **{"chunk": 16, "mem_chunk": 16, **values})
    generator, state = torch.Generator().manual_seed(5), module.initial_state(1)
    sizes = {name: tensor.shape for name, tensor in state.flat().items()}
    with torch.no_grad():
        for _ in range(10_007 // 517 + 1):
            x = torch.randn(1, 517, D, generator=generator)
            y, state = module(x, state)
            assert y.isfinite().all()
        flat = state.flat()
        assert {name: tensor.shape for name, tensor in flat.items()} == sizes and state.position > 10_000
        assert all(tensor.abs().max() < 1e4 for name, tensor in flat.items() if name != "position")
        probe = torch.randn(1, 8, D, generator=generator)
        assert (module(probe, state)[0] - module(probe)[0]).abs().max() > 1e-2, "what was read still matters"


def test_flat_round_trip_is_exact() -> None:
    module, x = build(momentum=True, mem_chunk=8), inputs()
    with torch.no_grad():
        _, state = module(x[:, :7])
        again = MemoryState.from_flat({name: tensor.clone() for name, tensor in state.flat().items()})
        assert distance(state, again) == 0 and all(
            "momentum" in t.__dict__ and t.momentum for t in again.tracks.values()
        )
        assert torch.equal(module(x[:, 7:], again)[0], module(x[:, 7:], state)[0])


def test_a_new_block_is_neutral() -> None:
    module = SelfModifyingTitans(D, H, MemoryConfig())
    assert torch.equal(module(inputs(dtype=torch.float32))[0], torch.zeros(2, T, D))


def test_memories_keep_float32_under_autocast() -> None:
    module, x = build(torch.float32, chunk=8, mem_chunk=8), inputs(dtype=torch.float32)
    with torch.no_grad():
        exact = module(x)[0]
        with torch.autocast("cpu", torch.bfloat16):
            y, state = module(x)
    assert y.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for track in state.tracks.values() for t in track.running.values())
    assert 0 < (y - exact).abs().max() < 0.05 * exact.abs().max()


def test_reset_parameters_neither_uses_nor_moves_the_global_generator() -> None:
    module = SelfModifyingTitans(D, H, MemoryConfig(layers=2, objective="l2"))
    before = torch.get_rng_state()
    module.reset_parameters(torch.Generator().manual_seed(3))
    first = [p.detach().clone() for p in module.parameters()]
    module.reset_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, module.parameters(), strict=True))


def test_a_state_of_another_batch_is_refused() -> None:
    module = build()
    with pytest.raises(ValueError, match=r"holds 3 sequences, the call 2"):
        module(inputs(), module.initial_state(3, torch.float64))
    with pytest.raises(ValueError, match=r"dim=10 is not a multiple of heads=4"):
        SelfModifyingTitans(10, 4, MemoryConfig())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": "huber"}, r"memory\.objective='huber'"),
        ({"sign": "minus"}, r"memory\.sign='minus'"),
        ({"forget": "all"}, r"memory\.forget='all'"),
        ({"layers": 3}, r"memory\.layers=3"),
        ({"factor": 0}, r"memory\.factor=0"),
        ({"factor": 2}, r"memory\.factor=2 belongs to objective=l2"),
        ({"objective": "l2", "sign": "literal"}, r"memory\.sign=literal belongs to objective=dot"),
        ({"chunk": 0}, r"memory\.chunk=0"),
        ({"mem_chunk": -4}, r"memory\.mem_chunk=-4"),
        ({"expansion": 0}, r"memory\.expansion=0"),
        ({"conv": 0}, r"memory\.conv=0"),
        ({"eta_max": 2.0}, r"memory\.eta_max=2\.0"),
        ({"layers": 2}, r"memory\.eta_max=1\.0 .*objective=l2"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**values)
