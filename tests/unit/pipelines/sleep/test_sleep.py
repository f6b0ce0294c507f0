"""Asleep: batches are a pure function of the plan, and the loss is the mixture that the page promises."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nl_model.config import LevelConfig
from nl_model.model import NestedLM
from pipelines.config.sleep import SleepConfig
from pipelines.experience import ExperienceStore, Record, Snapshot
from pipelines.sleep.batches import RoundBatches
from pipelines.sleep.losses import guide_logits, merge_weights, sleep_loss
from pipelines.sleep.plan import RoundPlan, num_steps
from pipelines.sleep.schedule import learning_rate, mixing
from pipelines.sleep.training import Place

CONTEXT, BASE, STREAMED = 16, 9, 40
FIRST, LAST = 22, 36
QUARANTINED = {3, 12, 25, 30}
RECENT = [key for key in range(FIRST, LAST + 1) if key not in QUARANTINED]
OLD = [key for key in range(-BASE, FIRST) if key not in QUARANTINED]
CFG = SleepConfig(batch=8, recent=0.5)


def record(key: int) -> Record:
    tokens = np.random.default_rng(key + 100).integers(0, 257, CONTEXT + 1)
    kind = "base" if key < 0 else "quarantined" if key in QUARANTINED else "real"
    surprise = math.inf if kind == "quarantined" else 1.0 + key % 5
    return Record(key=key, source=f"s{key % 3}", kind=kind, surprise=surprise, tokens=tokens)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Snapshot]:
    """A base mixture of 9 rows and 40 streamed ones, four of them quarantined."""
    path = tmp_path_factory.mktemp("round") / "store"
    with ExperienceStore.open(path, CONTEXT, "uint16") as store:
        store.append([record(-1 - i) for i in range(BASE)])
        store.commit()
        for first in range(0, STREAMED, 8):
            store.append([record(key) for key in range(first, first + 8)], {"key": first + 8})
            store.commit()
    yield Snapshot.open(path)


def plan(**values: Any) -> RoundPlan:
    return replace(RoundPlan(2, 7, FIRST, LAST, "fast", 1, 640, 6, 5), **values)


def keys(batches: RoundBatches, step: int) -> Tuple[List[int], List[int]]:
    """Recent and old stream keys of a step."""
    rows, recent = batches.rows(step)
    found = batches.snapshot.keys[rows]
    return found[recent].tolist(), found[~recent].tolist()


def test_batches_are_a_pure_function_of_the_plan(snapshot: Snapshot) -> None:
    one, two = RoundBatches(snapshot, plan(), CFG), RoundBatches(snapshot, plan(), CFG)
    forwards = [one.batch(step) for step in range(12)]
    for step in reversed(range(12)):  # neither order nor earlier calls matter
        np.random.seed(step)
        batch, before = two.batch(step), forwards[step]
        tokens, recent = batch.tokens_BS, batch.recent_B
        assert torch.equal(tokens, before.tokens_BS) and torch.equal(recent, before.recent_B)
        assert np.array_equal(batch.keys_B, before.keys_B)
        assert tokens.shape == (8, CONTEXT + 1) and tokens.dtype == torch.int64 and recent.dtype == torch.bool


@pytest.mark.parametrize("changed", [{"seed": 6}, {"round": 3}], ids=str)
def test_other_rounds_draw_other_batches(snapshot: Snapshot, changed: Dict[str, int]) -> None:
    one, other = (RoundBatches(snapshot, p, CFG) for p in (plan(), plan(**changed)))
    assert [keys(one, step)[0] for step in range(3)] != [keys(other, step)[0] for step in range(3)]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_share_a_batch_without_rest(snapshot: Snapshot, world: int) -> None:
    batches = RoundBatches(snapshot, plan(), CFG)
    for step in range(4):
        batch = batches.batch(step)
        shares = [batches.batch(step, Place(rank, world)) for rank in range(world)]
        assert [len(share.tokens_BS) for share in shares] == [8 // world] * world
        whole, mask, keys = torch.empty_like(batch.tokens_BS), torch.empty_like(batch.recent_B), batch.keys_B.copy()
        for rank, share in enumerate(shares):
            whole[rank::world], mask[rank::world], keys[rank::world] = share.tokens_BS, share.recent_B, share.keys_B
        assert torch.equal(whole, batch.tokens_BS) and torch.equal(mask, batch.recent_B)
        assert np.array_equal(keys, batch.keys_B)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_recent_and_old_are_mixed_as_configured(snapshot: Snapshot, share: float, count: int) -> None:
    batches = RoundBatches(snapshot, plan(), replace(CFG, recent=share))
    for step in range(10):
        recent, old = keys(batches, step)
        assert len(recent) == count and len(old) == 8 - count
        assert set(recent) <= set(RECENT) and set(old) <= set(OLD)


@pytest.mark.parametrize(("batch", "share"), [(4, 0.2), (8, 0.2), (4, 0.1), (3, 0.5), (2, 0.05)])
def test_a_share_that_is_no_whole_number_of_sequences_holds_over_the_steps(
    snapshot: Snapshot, batch: int, share: float
) -> None:
    batches = RoundBatches(snapshot, plan(), replace(CFG, batch=batch, recent=share))
    counts = [len(keys(batches, step)[0]) for step in range(100)]
    assert sum(counts) == round(100 * batch * share)
    assert max(counts) - min(counts) <= 1, "spread evenly"
    assert all(len(batches.batch(step).tokens_BS) == batch for step in range(10))


def test_every_recent_row_is_visited_once_per_pass(snapshot: Snapshot) -> None:
    batches = RoundBatches(snapshot, plan(), CFG)
    visited = [key for step in range(len(RECENT)) for key in keys(batches, step)[0]]
    passes = [visited[i : i + len(RECENT)] for i in range(0, len(visited), len(RECENT))]
    assert len(passes) == 4
    for one in passes:
        assert sorted(one) == RECENT
    assert passes[0] != passes[1] and passes[0] != RECENT, "every pass has an order of its own"


@pytest.mark.parametrize("sampler", ["uniform", "recency", "surprise"])
def test_old_experience_reaches_back_to_the_base_and_never_draws_what_is_quarantined(
    snapshot: Snapshot, sampler: str
) -> None:
    batches = RoundBatches(snapshot, plan(), replace(CFG, sampler=sampler, half_life=8))
    drawn = {key for step in range(80) for part in keys(batches, step) for key in part}
    assert not drawn & QUARANTINED
    assert drawn <= set(RECENT) | set(OLD), "nothing behind the snapshot's last key"
    assert any(key < 0 for key in drawn)
    if sampler == "uniform":
        assert drawn == set(RECENT) | set(OLD)


def test_tokens_are_those_that_were_stored(snapshot: Snapshot) -> None:
    batches = RoundBatches(snapshot, plan(), CFG)
    rows, _ = batches.rows(1)
    for row, tokens in zip(rows, batches.batch(1).tokens_BS, strict=True):
        assert tokens.tolist() == record(int(snapshot.keys[row])).tokens.tolist()


def test_without_old_experience_all_of_a_batch_is_recent(tmp_path: Path) -> None:
    with ExperienceStore.open(tmp_path / "store", CONTEXT, "uint16") as store:
        store.append([record(key) for key in range(16)])
        store.commit()
    batches = RoundBatches(Snapshot.open(tmp_path / "store"), plan(first_key=0, last_key=15), CFG)
    batch = batches.batch(0)
    assert len(batch.tokens_BS) == 8 and bool(batch.recent_B.all())


def test_a_round_whose_recent_experience_is_quarantined_replays_old_experience(snapshot: Snapshot) -> None:
    batches = RoundBatches(snapshot, plan(first_key=30, last_key=30), CFG)
    recent, old = keys(batches, 0)
    assert recent == [] and len(old) == 8 and max(old) < 30


def test_a_round_without_usable_experience_is_refused(tmp_path: Path) -> None:
    with ExperienceStore.open(tmp_path / "store", CONTEXT, "uint16") as store:
        store.append([replace(record(0), kind="quarantined")])
        store.commit()
    with pytest.raises(ValueError, match="round 2: no usable experience up to key 0"):
        RoundBatches(Snapshot.open(tmp_path / "store"), plan(first_key=0, last_key=0), CFG)


@pytest.mark.parametrize(
    ("rows", "values", "steps"),
    [
        (1184, {"tokens_per_token": 0.75, "batch": 8}, 111),
        (1185, {"tokens_per_token": 0.75, "batch": 8}, 111),
        (1195, {"tokens_per_token": 0.75, "batch": 8}, 112),
        (1, {}, 1),
        (100, {"tokens_per_token": 0.0}, 0),
        (1000, {"tokens_per_token": 2.0, "batch": 4, "max_steps": 40}, 40),
        (10, {"tokens_per_token": 2.0, "batch": 4, "max_steps": 40}, 5),
    ],
)
def test_num_steps(rows: int, values: Dict[str, float], steps: int) -> None:
    assert num_steps(replace(SleepConfig(), **values), 0, rows - 1) == steps  # type: ignore[arg-type]


@given(st.lists(st.integers(4, 300), min_size=1, max_size=12), st.floats(0.5, 3.0), st.sampled_from([1, 2, 4]))
def test_rounds_add_up_however_the_stream_is_cut(lengths: List[int], per_token: float, batch: int) -> None:
    cfg, ends = SleepConfig(tokens_per_token=per_token, batch=batch), list(itertools.accumulate(lengths))
    steps = [num_steps(cfg, last - length, last - 1) for last, length in zip(ends, lengths, strict=True)]
    assert all(step >= 1 for step in steps)
    short = sum(per_token * length / batch < 2 for length in lengths)  # a round has one step at least
    assert abs(sum(steps) - per_token * ends[-1] / batch) <= 1 + short


def test_the_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    steps = 200
    rates = [learning_rate(0.4, step, steps) for step in range(steps)]
    assert rates[:20] == pytest.approx([0.4 * (i + 1) / 20 for i in range(20)])
    assert max(rates) == pytest.approx(0.4) and rates.index(max(rates)) in (19, 20)
    assert all(a > b for a, b in itertools.pairwise(rates[20:]))
    assert rates[110] == pytest.approx(0.4 * (0.05 + 0.95 / 2)), "half way down at half time"
    assert 0.4 * 0.05 < rates[-1] < 0.4 * 0.052
    assert learning_rate(0.4, 0, 1) == 0.4
    assert all(0 < learning_rate(1.0, step, n) <= 1.0 for n in range(1, 12) for step in range(n))


@pytest.mark.parametrize(("kind", "half"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_the_weight_of_the_guides_runs_from_1_to_its_end(kind: str, half: float) -> None:
    factors = [mixing(kind, step, 101) for step in range(101)]
    assert factors[0] == 1.0 and factors[50] == pytest.approx(half)
    assert factors[100] == pytest.approx(1.0 if kind == "constant" else 0.0, abs=1e-12)
    assert all(a >= b for a, b in itertools.pairwise(factors))
    assert mixing(kind, 0, 1) == 1.0
    if kind == "cosine":
        assert factors[10] > mixing("linear", 10, 101)


def test_what_a_round_reads_is_known_before(snapshot: Snapshot) -> None:
    batches = RoundBatches(snapshot, plan(), CFG)
    for steps in (1, 2, 3, 9):
        read = {row for step in range(steps) for row in batches.rows(step)[0][:4].tolist()}
        assert batches.visited(steps).tolist() == sorted(read)
    assert len(RoundBatches(snapshot, plan(), replace(CFG, recent=0.0)).visited(5)) == 0
    whole = batches.keys(3)
    assert whole.tolist() == [key for part in keys(batches, 3) for key in part]
    assert batches.keys(3, Place(1, 4)).tolist() == whole[1::4].tolist()


Models = Tuple[NestedLM, NestedLM, NestedLM]


@pytest.fixture
def models(make_model: Callable[..., NestedLM], make_levels: Callable[..., Dict[str, LevelConfig]]) -> Models:
    """Student, teacher, anchor: three models with weights of their own."""
    student, teacher, anchor = (make_model(make_levels(), 257, seed) for seed in range(3))
    return student, teacher, anchor


@pytest.fixture
def batch(snapshot: Snapshot) -> Tuple[Tensor, Tensor]:
    found = RoundBatches(snapshot, plan(), replace(CFG, recent=0.25)).batch(0)
    return found.tokens_BS, found.recent_B


def by_hand(models: Models, tokens: Tensor, recent: Tensor, teacher_weight: float, anchor_weight: float) -> float:
    """The loss in float64, token by token."""
    with torch.no_grad():
        student, teacher, anchor = (m(tokens[:, :-1]).double().log_softmax(-1) for m in models)
    total = 0.0
    for i in range(len(tokens)):
        guide, weight = (teacher, teacher_weight) if recent[i] else (anchor, anchor_weight)
        for t in range(CONTEXT):
            truth = -float(student[i, t, tokens[i, t + 1]])
            divergence = float((guide[i, t].exp() * (guide[i, t] - student[i, t])).sum())
            total += (1 - weight) * truth + weight * divergence
    return total / (len(tokens) * CONTEXT)


@pytest.mark.parametrize(("teacher", "anchor"), [(0.3, 0.7), (1.0, 1.0), (0.0, 0.6)])
def test_the_loss_is_the_formula(models: Models, batch: Tuple[Tensor, Tensor], teacher: float, anchor: float) -> None:
    tokens, recent = batch
    student = models[0]
    cfg = replace(CFG, teacher=teacher, anchor=anchor)
    guides = guide_logits(models[1] if teacher else None, models[2], tokens, recent)
    loss, parts = sleep_loss(student(tokens[:, :-1]), tokens, recent, guides, cfg)
    assert float(loss.detach()) == pytest.approx(by_hand(models, tokens, recent, teacher, anchor), rel=1e-5)
    nll = student.nll(tokens).detach()
    assert float(parts["truth_recent"]) == pytest.approx(float(nll[recent].mean()), rel=1e-5)
    assert float(parts["truth_old"]) == pytest.approx(float(nll[~recent].mean()), rel=1e-5)
    assert set(parts) == {"truth_recent", "truth_old", "anchor"} | ({"teacher"} if teacher else set())
    assert not any(part.requires_grad for part in parts.values())
    mixed = (1 - anchor) * float(parts["truth_old"]) + anchor * float(parts["anchor"])
    taught = float(parts["teacher"]) if teacher else 0.0
    expected = 0.25 * ((1 - teacher) * float(parts["truth_recent"]) + teacher * taught) + 0.75 * mixed
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_without_guides_the_loss_is_that_of_the_true_tokens(models: Models, batch: Tuple[Tensor, Tensor]) -> None:
    tokens, recent = batch
    loss, parts = sleep_loss(models[0](tokens[:, :-1]), tokens, recent, guide_logits(None, None, tokens, recent), CFG)
    assert float(loss.detach()) == pytest.approx(float(models[0].nll(tokens).detach().mean()), rel=1e-6)
    assert set(parts) == {"truth_recent", "truth_old"}


def test_the_gradient_goes_to_the_student_alone_and_to_all_of_it(models: Models, batch: Tuple[Tensor, Tensor]) -> None:
    (student, teacher, anchor), (tokens, recent) = models, batch
    guides = guide_logits(teacher, anchor, tokens, recent)
    assert {name: logits.shape for name, logits in guides.items()} == {
        "teacher": (2, CONTEXT, 257),
        "anchor": (6, CONTEXT, 257),
    }
    loss, _ = sleep_loss(student(tokens[:, :-1]), tokens, recent, guides, replace(CFG, teacher=0.5, anchor=0.5))
    loss.backward()
    for guide in (teacher, anchor):
        assert all(p.grad is None for p in guide.parameters())
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in student.parameters())


@pytest.mark.parametrize(("flag", "left"), [(True, "teacher"), (False, "anchor")])
def test_a_batch_of_one_kind_needs_one_guide(
    models: Models, batch: Tuple[Tensor, Tensor], flag: bool, left: str
) -> None:
    tokens, everywhere = batch[0], torch.full((8,), flag)
    guides = guide_logits(models[1], models[2], tokens, everywhere)
    assert list(guides) == [left] and len(guides[left]) == 8
    cfg = replace(CFG, teacher=0.4, anchor=0.4)
    loss, parts = sleep_loss(models[0](tokens[:, :-1]), tokens, everywhere, guides, cfg)
    assert float(loss.detach()) == pytest.approx(by_hand(models, tokens, everywhere, 0.4, 0.4), rel=1e-5)
    assert set(parts) == {left, "truth_recent" if flag else "truth_old"}


def test_a_student_that_is_its_guides_diverges_from_neither(models: Models, batch: Tuple[Tensor, Tensor]) -> None:
    (student, *_), (tokens, recent) = models, batch
    guides = guide_logits(student, student, tokens, recent)
    _, parts = sleep_loss(student(tokens[:, :-1]), tokens, recent, guides, CFG)
    assert abs(float(parts["teacher"])) < 1e-6 and abs(float(parts["anchor"])) < 1e-6


def test_merging_averages_with_the_anchor_and_0_changes_nothing() -> None:
    new, old = {"a": torch.tensor([1.0, 3.0])}, {"a": torch.tensor([0.0, 1.0]), "unused": torch.zeros(1)}
    assert merge_weights(new, old, 0.25)["a"].tolist() == [0.75, 2.5]
    assert torch.equal(merge_weights(new, old, 0.0)["a"], new["a"])
    with pytest.raises(ValueError, match=r"sleep\.merge=1\.5"):
        SleepConfig(merge=1.5)
