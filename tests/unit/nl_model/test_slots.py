"""Expert slots: nothing changes until one is trained, only it changes then, and folding keeps what it learned."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Callable, Dict, List

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nl_model.config import LevelConfig, ModelConfig
from nl_model.model import LevelMLP, NestedLM
from nl_model.online import OnlineLevels
from nl_model.slots import (
    LowRank,
    Slot,
    SlotConfig,
    activate,
    active_slots,
    add_slots,
    fold,
    remove_slots,
    reset_slots,
    slot_parameters,
    slotted,
)
from nl_model.streaming import StreamingModel
from nl_model.weights import load_into

VOCAB = 17
SHAPE = ModelConfig(dim=8, blocks=3, heads=2, context=16)
ROUTERS = [0, 1, 2]


@pytest.fixture
def build(
    make_model: Callable[..., NestedLM], make_levels: Callable[..., Dict[str, LevelConfig]]
) -> Callable[..., NestedLM]:
    """A trained-looking model; arguments: dtype, wiring."""

    def built(dtype: torch.dtype = torch.float64, wiring: str = "sequential") -> NestedLM:
        return make_model(make_levels(), VOCAB, dtype=dtype, shape=replace(SHAPE, wiring=wiring))

    return built


def tokens(seed: int = 0, batch: int = 3, length: int = 16) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def fill(model: NestedLM, level: str, index: int, scale: float = 0.2) -> None:
    """Give a slot weights as training would."""
    generator = torch.Generator().manual_seed(100 + index)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name in slot_parameters(model, level, index):
            drawn = torch.empty(named[name].shape, dtype=torch.float64).normal_(0.0, scale, generator=generator)
            named[name].copy_(drawn)


def train_only(model: NestedLM, names: List[str]) -> List[nn.Parameter]:
    """Let gradients reach the named parameters and no other."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def copies(model: NestedLM) -> Dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(model: NestedLM, before: Dict[str, Tensor]) -> List[str]:
    return [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wiring", ["sequential", "independent"])
@pytest.mark.parametrize("top_k", ROUTERS)
def test_inactive_slots_leave_logits_as_they_are_to_the_bit(
    build: Callable[..., NestedLM], top_k: int, wiring: str, dtype: torch.dtype
) -> None:
    """Check 24, first half."""
    model = build(dtype, wiring)
    before, names = model(tokens()), [name for name, _ in model.named_parameters()]
    add_slots(model, ["medium", "slow"], SlotConfig(3, 2, top_k))
    for level in ("medium", "slow"):
        fill(model, level, 1)  # also where a slot that is off is not empty
    assert torch.equal(model(tokens()), before)
    assert [n for n, _ in model.named_parameters() if ".slots." not in n] == names, "nothing was renamed"
    assert torch.equal(remove_slots(model)(tokens()), before)
    assert [n for n, _ in model.named_parameters()] == names, "all slots are gone"


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("top_k", ROUTERS)
def test_activation_of_an_empty_slot_changes_nothing(build: Callable[..., NestedLM], top_k: int, spread: bool) -> None:
    """Check 24, second half: B is zero."""
    model = add_slots(build(), ["slow"], SlotConfig(3, 2, top_k))
    before = model(tokens())
    activate(model, "slow", 0, seed=5, spread=spread)
    assert torch.equal(model(tokens()), before)
    assert active_slots(model, "slow") == [0]


@pytest.mark.parametrize("top_k", ROUTERS)
def test_activation_beside_slots_that_fire_changes_nothing(build: Callable[..., NestedLM], top_k: int) -> None:
    """A new slot ranks behind all that fire, so that none of them loses its place among the top_k."""
    model = add_slots(build(), ["slow"], SlotConfig(3, 2, top_k))
    empty = model(tokens())
    for index in (0, 1):
        activate(model, "slow", index, seed=5)
        fill(model, "slow", index)
    before = model(tokens())
    assert float((before - empty).detach().abs().max()) > 1e-3
    activate(model, "slow", 2, seed=6)
    assert torch.equal(model(tokens()), before)


@pytest.mark.parametrize("top_k", ROUTERS)
def test_only_the_new_slot_learns(build: Callable[..., NestedLM], top_k: int) -> None:
    """Check 23: nothing else has a gradient, and every other tensor stays to the bit, older slots included."""
    model = add_slots(build(), ["medium", "slow"], SlotConfig(3, 2, top_k))
    activate(model, "slow", 0, seed=1)
    fill(model, "slow", 0)
    names = activate(model, "slow", 1, seed=2)
    before = copies(model)
    optimizer = torch.optim.AdamW(train_only(model, names), lr=0.05, weight_decay=0.1)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model.nll(tokens(length=17)).mean()
        loss.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} <= set(names)
        optimizer.step()
        losses.append(float(loss.detach()))
    moved = [".slots.1.up", ".slots.1.down"] + [".slots.1.router"] * bool(top_k)
    assert {f"blocks.{i}.levels.slow{part}" for i in range(3) for part in moved} <= {
        name.rsplit(".", 2 if "router" not in name else 1)[0] for name in changed(model, before)
    }
    assert set(changed(model, before)) <= set(names)
    assert losses[-1] < losses[0] - 0.01


def test_at_the_first_step_gradient_reaches_b_and_then_a(build: Callable[..., NestedLM]) -> None:
    model = add_slots(build(), ["slow"], SlotConfig(1, 2, 1))
    names = activate(model, "slow", 0, seed=2)
    optimizer = torch.optim.SGD(train_only(model, names), lr=0.5)
    reached = []
    for _ in range(2):
        optimizer.zero_grad()
        model.nll(tokens(length=17)).mean().backward()
        reached.append({n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)})
        optimizer.step()
    assert reached[0] == {name for name in names if name.endswith(".b.weight")}
    assert reached[1] == set(names)


def test_a_slot_is_a_function_of_its_seed(build: Callable[..., NestedLM]) -> None:
    drawn: List[Dict[str, Tensor]] = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed + len(drawn))
        model = add_slots(build(), ["slow"], SlotConfig(2, 2, 1))
        activate(model, "slow", 1, seed, spread=True)
        drawn.append(copies(model))
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    a = [f"blocks.{i}.levels.slow.slots.1.up.a.weight" for i in range(3)]
    assert not torch.equal(drawn[0][a[0]], drawn[2][a[0]])
    assert not torch.equal(drawn[0][a[0]], drawn[0][a[1]]), "every MLP has slots of its own"


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-5), (torch.float64, 1e-12)], ids=str)
def test_folding_without_a_router_is_exact(build: Callable[..., NestedLM], dtype: torch.dtype, close: float) -> None:
    model = add_slots(build(dtype), ["slow"], SlotConfig(3, 2))
    plain = model(tokens())
    for index in (0, 2):
        activate(model, "slow", index, seed=1)
        fill(model, "slow", index)
    before = model(tokens())
    assert float((before - plain).detach().abs().max()) > 1e-2
    report = fold(model, "slow", tokens())
    assert active_slots(model, "slow") == [] and set(report.gates.values()) == {1.0} and len(report.gates) == 12
    assert report.divergence == pytest.approx(0.0, abs=close)
    folded = remove_slots(model)
    assert type(folded.blocks[0].levels["slow"]) is LevelMLP  # type: ignore[index]
    assert float((folded(tokens()) - before).detach().abs().max()) < close
    assert float((folded(tokens(9)) - add_slots(folded, ["slow"], SlotConfig())(tokens(9))).detach().abs().max()) == 0.0


def test_folding_routed_slots_reports_what_it_costs(build: Callable[..., NestedLM]) -> None:
    model = add_slots(build(), ["slow"], SlotConfig(2, 2, 1))
    for index in (0, 1):
        activate(model, "slow", index, seed=1)
        fill(model, "slow", index)
    before = model(tokens()).detach()
    with pytest.raises(ValueError, match=r"'slow' has routed slots.*give tokens"):
        fold(model, "slow")
    report = fold(model, "slow", tokens())
    after = model(tokens()).detach()
    log_before, log_after = before.log_softmax(-1), after.log_softmax(-1)
    divergence = (log_before.exp() * (log_before - log_after)).sum(-1).mean()
    assert report.divergence is not None and report.divergence > 1e-6
    assert report.divergence == pytest.approx(float(divergence), rel=1e-9)
    assert all(0 <= gate <= 1 for gate in report.gates.values()) and len(set(report.gates.values())) > 2


def test_a_routed_gate_that_is_constant_folds_exactly(build: Callable[..., NestedLM]) -> None:
    model = add_slots(build(), ["slow"], SlotConfig(1, 2, 1))
    names = activate(model, "slow", 0, seed=1)
    fill(model, "slow", 0)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name in (n for n in names if "router" in n):
            named[name].fill_(0.0 if name.endswith("weight") else 0.7)
    before = model(tokens())
    report = fold(model, "slow", tokens())
    assert list(report.gates.values()) == pytest.approx([1 / (1 + math.exp(-0.7))] * 6, rel=1e-9)
    assert float((model(tokens()) - before).detach().abs().max()) < 1e-12


def test_the_constant_of_a_gate_is_the_nearest(build: Callable[..., NestedLM]) -> None:
    """Least squares on the top MLP's last matrix, whose change is linear in the constant."""
    model = add_slots(build(), ["slow"], SlotConfig(1, 2, 1))
    activate(model, "slow", 0, seed=1)
    fill(model, "slow", 0)
    slot = slotted(model, "slow")["blocks.2.levels.slow"].slots[0].down
    seen: List[Tensor] = []
    assert isinstance(slot, LowRank)
    handle = slot.register_forward_hook(lambda m, a, y: seen.extend((y, m.b(m.a(a[0])))))
    model(tokens())
    handle.remove()
    gated, full = (t.detach() for t in seen)
    gate = fold(model, "slow", tokens()).gates["blocks.2.levels.slow.slots.0.down"]

    def error(constant: float) -> float:
        return float((gated - constant * full).square().sum())

    assert 0 < gate < 1 and error(gate) < min(error(gate + 1e-3), error(gate - 1e-3))


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_router_fires_the_best_slots_only(build: Callable[..., NestedLM], top_k: int) -> None:
    model = add_slots(build(), ["slow"], SlotConfig(4, 2, top_k))
    for index in range(3):
        activate(model, "slow", index, seed=index)
        fill(model, "slow", index, scale=1.0)
    mlp = slotted(model, "slow")["blocks.0.levels.slow"]
    x_BTD = torch.randn(4, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gates_BTS = torch.cat(list(mlp.gates(x_BTD)), -1).detach()
    routers = [slot.router for slot in mlp.slots if isinstance(slot, Slot) and slot.router is not None]
    score_BTS = torch.cat([router(x_BTD) for router in routers], -1).detach()
    assert not gates_BTS[..., 3].any(), "an inactive slot never fires"
    fired = set()
    for gates_S, score_S in zip(gates_BTS.flatten(0, 1), score_BTS.flatten(0, 1)[:, :3], strict=True):
        best = [i for i in score_S.argsort(descending=True).tolist() if score_S[i] >= 0][:top_k]
        assert sorted(gates_S.nonzero().flatten().tolist()) == sorted(best)
        assert gates_S[best].tolist() == pytest.approx(score_S[best].sigmoid().tolist())
        fired.add(len(best))
    assert fired >= {0, top_k}, "some tokens stay with the base"


def test_slots_survive_a_state_dict(build: Callable[..., NestedLM]) -> None:
    model = add_slots(build(), ["slow"], SlotConfig(3, 2, 1))
    activate(model, "slow", 1, seed=1)
    fill(model, "slow", 1)
    other = add_slots(build(), ["slow"], SlotConfig(3, 2, 1))
    other.load_state_dict(model.state_dict())
    assert active_slots(other, "slow") == [1] and torch.equal(other(tokens()), model(tokens()))
    plain = build()
    load_into(other, dict(plain.named_parameters()))
    reset_slots(other, "slow")
    assert active_slots(other, "slow") == [] and torch.equal(other(tokens()), plain(tokens()))
    assert all(not p.any() for n, p in other.named_parameters() if ".slots." in n)


def test_awake_nobody_writes_a_slot(build: Callable[..., NestedLM]) -> None:
    """Levels go on writing their own weights, shared by a batch or per sequence, with their slots in force."""
    model = add_slots(build(), ["medium", "slow"], SlotConfig(2, 2, 1))
    for level in ("medium", "slow"):
        activate(model, level, 0, seed=1)
        fill(model, level, 0)
    logits, slots = model(tokens()), {n for n, _ in model.named_parameters() if ".slots." in n}
    stream = StreamingModel(model, 3, learn=False)
    assert float((stream.feed(tokens()) - logits).detach().abs().max()) < 1e-12
    assert not slots & set(stream.weights())
    StreamingModel(model, 2).feed(tokens(batch=2, length=140))
    before = copies(model)
    online = OnlineLevels(model, ["fast", "medium"])
    online.learn(tokens(batch=8, length=17))
    moved = set(changed(model, before))
    assert moved == {n for n, _ in model.named_parameters() if ".fast." in n or ".medium." in n} - slots
    assert all(p.grad is None for n, p in model.named_parameters() if n in slots)


def test_slots_ask_for_levels_that_exist_and_have_none(build: Callable[..., NestedLM]) -> None:
    with pytest.raises(ValueError, match="level 'deep' cannot get slots; the model's levels are fast, medium, slow"):
        add_slots(build(), ["deep"], SlotConfig())
    with pytest.raises(ValueError, match="level 'slow' has slots already"):
        add_slots(add_slots(build(), ["slow"], SlotConfig()), ["slow"], SlotConfig())
    for key, value in (("slots", 0), ("rank", 0), ("top_k", -1)):
        with pytest.raises(ValueError, match=f"slots.{key}={value} must be at least"):
            SlotConfig(**{key: value})


def test_a_slot_adds_two_thin_products_per_matrix(build: Callable[..., NestedLM]) -> None:
    """Active or not, so that shapes and speed never change."""
    plain, model = build(), add_slots(build(), ["slow"], SlotConfig(2, 2))
    counts = []
    for one in (plain, model):
        with FlopCounterMode(display=False) as counter:
            one(tokens())
        counts.append(counter.get_total_flops())
    width = model.level_configs["slow"].width
    assert counts[1] - counts[0] == tokens().numel() * 3 * 2 * 2 * 2 * 2 * (8 + width)
