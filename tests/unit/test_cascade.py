"""The cascade: who hands over to whom and when, in which order, and that nothing else changes."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Callable, Dict, List, Tuple

import pytest
import torch
from torch import Tensor

from nl_model.config import LevelConfig, ModelConfig, OptimizerConfig
from nl_model.model import NestedLM
from nl_model.online import OnlineLevels
from nl_model.slots import active_slots, fold, has_slots, slot_parameters
from pipelines import cascade
from pipelines.cascade import Cascade, Transfer, prospective, transfers_due
from pipelines.sleep_config import SleepConfig
from pipelines.student import expand, folded, receivers_due, student_step_flops

VOCAB = 17
SHAPE = ModelConfig(dim=8, blocks=2, heads=2, context=16)
SLOTS = SleepConfig(
    mode="slots", slots=2, slot_rank=2, batch=4, teacher=0.5, anchor=0.0, optimizer=OptimizerConfig(lr=3e-2)
)
PERIODS = {"fast": 16, "medium": 32, "slow": 64, "glacial": 192}


def levels(periods: Dict[str, int] | None = None) -> Dict[str, LevelConfig]:
    periods = periods or PERIODS
    slowest = max(periods, key=lambda name: periods[name])
    return {
        name: LevelConfig(
            period=period,
            width=6,
            blocks="all",
            owner="pool" if name == slowest else "learner",
            optimizer=OptimizerConfig(lr=1e-2),
        )
        for name, period in periods.items()
    }


@pytest.fixture
def model(make_model: Callable[..., NestedLM]) -> NestedLM:
    return make_model(levels(), VOCAB, dtype=torch.float64, shape=SHAPE)


def batches(step: int) -> Tuple[Tensor, Tensor]:
    """A pure function of the step; half of it is recent."""
    generator = torch.Generator().manual_seed(40 + step % 3)
    return torch.randint(VOCAB, (4, 17), generator=generator), torch.tensor([True, True, False, False])


def sequences(seed: int = 0, batch: int = 1) -> Tensor:
    return torch.randint(VOCAB, (batch, 17), generator=torch.Generator().manual_seed(seed))


def copies(model: NestedLM) -> Dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(model: NestedLM, before: Dict[str, Tensor]) -> List[str]:
    return [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]


def own(model: NestedLM, level: str) -> List[str]:
    return list(model.parameters_of(level))


def test_every_pair_of_neighbours_transfers_at_the_receivers_period() -> None:
    seen = [(t.sender, t.receiver, t.tokens) for end in range(8, 193, 8) for t in transfers_due(levels(), end - 8, end)]
    fast = [("fast", "medium", at) for at in range(32, 193, 32)]
    medium = [("medium", "slow", at) for at in (64, 128, 192)]
    expected = sorted([*fast, *medium, ("slow", "glacial", 192)], key=lambda t: (t[2], list(PERIODS).index(t[0])))
    assert seen == expected, "faster pairs go first, so that news travels all the way in one night"
    assert transfers_due(levels(), 0, 31) == () and transfers_due(levels(), 32, 63) == ()
    assert transfers_due(levels(), 0, 200) == (
        Transfer("fast", "medium", 192),
        Transfer("medium", "slow", 192),
        Transfer("slow", "glacial", 192),
    )


def test_the_plan_does_not_depend_on_how_the_levels_are_listed_or_counted() -> None:
    backwards = dict(reversed(list(levels().items())))
    assert transfers_due(backwards, 0, 64) == transfers_due(levels(), 0, 64)
    in_steps = {name: replace(level, unit="steps", period=level.period // 16) for name, level in levels().items()}
    assert transfers_due(in_steps, 0, 64, step_tokens=16) == transfers_due(levels(), 0, 64)


def test_a_prospective_write_is_the_write_but_not_applied(model: NestedLM) -> None:
    written = copy.deepcopy(model)
    online, reference = OnlineLevels(model), OnlineLevels(written)
    for one in (online, reference):
        for seed in range(2):
            one.observe(one.model.nll(sequences(seed)))
    before = copies(model)
    future = prospective(online.optimizers, "fast")
    assert changed(model, before) == []
    reference.optimizers.write("fast")
    assert set(future) == set(own(model, "fast")) and list(future) == changed(written, before)
    assert all(torch.equal(future[name], written.state_dict()[name]) for name in future)
    assert online.optimizers.tokens["fast"] == 0 and online.optimizers.tokens["medium"] == 32
    again = prospective(online.optimizers, "fast")
    assert all(torch.equal(again[name], before[name]) for name in again), "nothing was observed since"


@pytest.mark.parametrize("mode", ["slots", "dense"])
def test_compute_consolidate_update(model: NestedLM, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check 25: the teacher is the model before the sender's update; after the cycle the sender has its prospective
    weights, its old experts are reset, and apart from the receiver nothing else has changed (check 23)."""
    driver = Cascade(model, replace(SLOTS, mode=mode), seed=1)
    if mode == "slots":  # the sender once received
        driver.run(Transfer("fast", "medium", 32), {}, batches, 3)
        assert active_slots(model, "medium") == [0]
    sender = {name: model.state_dict()[name] + 0.05 for name in own(model, "medium")}
    before, logits, seen = copies(model), model(sequences()).detach(), {}

    def spy(student: NestedLM, names: List[str], teacher: NestedLM, *rest: object) -> Tuple[float, ...]:
        seen["teacher"] = teacher(sequences()).detach()
        seen["model"] = model(sequences()).detach()
        seen["student"] = copies(student)
        return train(student, names, teacher, *rest)  # type: ignore[arg-type]

    train = cascade.train_student
    monkeypatch.setattr(cascade, "train_student", spy)
    cycle = driver.run(Transfer("medium", "slow", 64), sender, batches, 4)

    assert torch.equal(seen["teacher"], logits) and torch.equal(seen["model"], logits), "captured before any update"
    student = seen["student"]
    assert all(torch.equal(student[name], sender[name]) for name in sender), "the student has the prospective weights"
    after = copies(model)
    assert all(torch.equal(after[name], sender[name]) for name in sender)
    experts = [name for name in after if ".medium.slots." in name or ".medium.active_S" in name]
    assert bool(experts) == (mode == "slots") and not any(bool(after[name].any()) for name in experts)
    masks = [f"blocks.{i}.levels.slow.active_S" for i in range(2)] if mode == "slots" else []
    assert set(cycle.trained) == set(slot_parameters(model, "slow", 0) if mode == "slots" else own(model, "slow"))
    allowed = {*cycle.trained, *sender, *experts, *masks}
    moved = set(changed(model, before))
    assert moved <= allowed and {*cycle.trained, *sender, *masks} <= moved
    assert (cycle.slot, active_slots(model, "slow")) == ((0, [0]) if mode == "slots" else (None, []))


def test_a_slot_learns_what_the_teacher_knows(model: NestedLM) -> None:
    """The student has forgotten the sender's experts; training its new slot brings it back to the teacher."""
    driver = Cascade(model, replace(SLOTS, teacher=1.0, slot_rank=4, recent=1.0), seed=1)
    everything = torch.ones(4, dtype=torch.bool)
    driver.run(Transfer("fast", "medium", 32), {}, batches, 3)
    named = dict(model.named_parameters())
    with torch.no_grad():  # experts worth knowing
        for name in slot_parameters(model, "medium", 0):
            named[name].normal_(0.0, 0.4, generator=torch.Generator().manual_seed(len(name)))
    cycle = driver.run(Transfer("medium", "slow", 64), {}, lambda step: (batches(step)[0], everything), 30)
    assert cycle.losses[-1] < 0.5 * cycle.losses[0], cycle.losses


def test_slots_are_folded_when_all_are_taken(model: NestedLM) -> None:
    """The size stays bounded over any number of cycles, and folding without a router costs nothing."""
    driver, sizes, cycles = Cascade(model, SLOTS, seed=1), set(), []
    for number in range(5):
        cycles.append(driver.run(Transfer("fast", "medium", 32 * (number + 1)), {}, batches, 2))
        sizes.add(sum(p.numel() for p in model.parameters()))
    assert [cycle.slot for cycle in cycles] == [0, 1, 0, 1, 0] and len(sizes) == 1
    assert [cycle.folded is not None for cycle in cycles] == [False, False, True, False, True]
    assert all(c.folded.largest < 1e-12 for c in cycles if c.folded is not None and c.folded.largest is not None)


@pytest.mark.parametrize("mode", ["slots", "dense"])
def test_a_night_after_every_period_of_a_stream(model: NestedLM, mode: str) -> None:
    """Four levels over the slowest one's period: all transfers run, no gradient is written twice, reruns are equal."""
    ends: List[Dict[str, Tensor]] = []
    for _ in range(2):
        one = copy.deepcopy(model)
        driver = Cascade(one, replace(SLOTS, mode=mode), seed=2)
        online, cycles = OnlineLevels(one, one.level_names[:-1]), []
        for number in range(12):
            online.observe(one.nll(sequences(number)))
            before = online.optimizers.writes["fast"]
            cycles += driver.advance(online, 16, batches, 1)
            assert online.optimizers.writes["fast"] == before + 1
        counts = [sum(c.transfer.sender == name for c in cycles) for name in ("fast", "medium", "slow")]
        assert counts == [6, 3, 1]
        assert online.optimizers.writes == {"fast": 12, "medium": 6, "slow": 3}
        ends.append(copies(one))
        assert active_slots(one, "slow") == [] and active_slots(one, "medium") == [], "both have just sent"
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert active_slots(one, "glacial") == ([0] if mode == "slots" else [])
    assert bool(torch.isfinite(one(sequences())).all())


def test_modes_that_are_no_cascade_are_refused(make_model: Callable[..., NestedLM], model: NestedLM) -> None:
    with pytest.raises(ValueError, match=r"sleep\.mode=all trains every level at once"):
        Cascade(model, SleepConfig(), seed=0)
    nested = make_model(levels(), VOCAB, shape=replace(SHAPE, wiring="nested"))
    with pytest.raises(ValueError, match=r"model\.wiring=nested sends a level back"):
        Cascade(nested, SLOTS, seed=0)
    for key, value in (("mode", "sparse"), ("slots", 0), ("slot_rank", 0), ("slot_top_k", -1)):
        with pytest.raises(ValueError, match=f"sleep.{key}="):
            replace(SLOTS, **{key: value})  # type: ignore[arg-type]


POOL = {
    name: replace(level, owner="pool" if name in ("slow", "glacial") else "learner") for name, level in levels().items()
}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (0, 64, ["slow"]),
        (64, 192, ["slow", "glacial"]),
        (150, 200, ["slow", "glacial"]),
        (192, 200, ["slow", "glacial"]),
    ],
)
def test_the_pool_receives_where_a_period_is_over(before: int, after: int, expected: List[str]) -> None:
    assert receivers_due(POOL, before, after) == expected


def test_in_mode_all_a_student_trains_whole(model: NestedLM) -> None:
    before = copies(model)
    expansion = expand(model, ["glacial"], SleepConfig(), seed=1)
    assert (expansion.receivers, expansion.frozen) == ((), []) and changed(model, before) == []


@pytest.mark.parametrize("mode", ["slots", "dense"])
@pytest.mark.parametrize("top_k", [0, 1])
def test_a_release_looks_the_same_in_every_mode(make_model: Callable[..., NestedLM], mode: str, top_k: int) -> None:
    """The pool's way: only the receivers' weights move, and after folding the plain model computes what was trained."""
    plain = make_model(POOL, VOCAB, dtype=torch.float64, shape=SHAPE)
    cfg = replace(SLOTS, mode=mode, slot_top_k=top_k)
    student, start = copy.deepcopy(plain), copies(plain)
    expansion = expand(student, ["slow"], cfg, seed=4)
    assert torch.equal(student(sequences()), plain(sequences())), "the student starts as the awake model"
    frozen = set(expansion.frozen)
    names = [name for name, _ in student.named_parameters() if name not in frozen]
    cascade.train_student(student, names, plain, None, batches, 5, cfg)
    trained = {name: p.detach().clone() for name, p in student.named_parameters()}
    report = folded(plain, trained, expansion, cfg, 4, sequences(batch=3))
    assert not has_slots(plain) and list(start) == list(copies(plain))
    assert {name.split(".levels.")[-1].split(".")[0] for name in changed(plain, start)} == {"slow"}
    assert set(changed(plain, start)) == set(own(plain, "slow"))
    assert report.largest is not None
    gap = float((plain(sequences(batch=3)) - student(sequences(batch=3))).detach().abs().max())
    exact = mode == "dense" or top_k == 0
    assert (gap < 1e-12) if exact else (0 < gap == pytest.approx(report.largest, rel=1e-6))


def test_a_slot_folded_by_hand_is_the_same(make_model: Callable[..., NestedLM]) -> None:
    one = make_model(POOL, VOCAB, dtype=torch.float64, shape=SHAPE)
    two = copy.deepcopy(one)
    expansion = expand(one, ["slow", "glacial"], SLOTS, seed=4)
    cascade.train_student(one, [n for n, _ in one.named_parameters() if ".slots." in n], two, None, batches, 3, SLOTS)
    folded(two, {n: p.detach() for n, p in one.named_parameters()}, expansion, SLOTS, 4)
    for level in expansion.receivers:
        fold(one, level)
    weights = dict(one.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in two.named_parameters())


def test_the_work_of_a_step_is_that_of_its_mode(make_model: Callable[..., NestedLM]) -> None:
    plain, found = make_model(POOL, VOCAB, shape=SHAPE), {}
    for mode in ("all", "dense", "slots"):
        cfg = replace(SLOTS, mode=mode, slots=1)
        found[mode] = student_step_flops(plain, expand(copy.deepcopy(plain), ["glacial"], cfg, seed=0), cfg)
    assert found["all"] > found["dense"] > found["slots"]
    assert all(a != b for a, b in itertools.combinations(found.values(), 2))
