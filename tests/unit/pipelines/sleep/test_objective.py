"""A round's objective: the right guide on the right text at every step, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import numpy as np
import pytest
import torch
from torch import Tensor

from nl_model.config import LevelConfig
from nl_model.distillation import forward_kl
from nl_model.model import NestedLM
from pipelines.config.sleep import ImitationConfig, SleepConfig
from pipelines.experience import ExperienceStore, Record, Snapshot
from pipelines.sleep.batches import RoundBatches
from pipelines.sleep.guides import StoredGuides, write_guides
from pipelines.sleep.losses import guide_logits, sleep_loss
from pipelines.sleep.objective import GuidedObjective
from pipelines.sleep.plan import RoundPlan
from pipelines.sleep.training import ALONE, Place

CONTEXT, V, ROWS, STEPS, SEED = 16, 31, 24, 6, 5
CFG = SleepConfig(batch=8, recent=0.5, teacher=0.4, anchor=0.3, continuation=6)
PLAN = RoundPlan(2, 1, 12, ROWS - 1, "fast", 1, 640, STEPS, SEED)
STUDY = 16
"""Steps of those objectives that a student has to learn from."""
Models = Tuple[NestedLM, NestedLM, NestedLM]


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RoundBatches]:
    path, random = tmp_path_factory.mktemp("objective") / "store", np.random.default_rng(0)
    with ExperienceStore.open(path, CONTEXT, "uint16") as store:
        rows = [random.integers(0, V, CONTEXT + 1) for _ in range(ROWS)]
        store.append([Record(key=i, source="s", surprise=1.0, tokens=tokens) for i, tokens in enumerate(rows)])
        store.commit()
    yield RoundBatches(Snapshot.open(path), PLAN, CFG)


@pytest.fixture(scope="module")
def models(make_model: Callable[..., NestedLM], make_levels: Callable[..., Dict[str, LevelConfig]]) -> Models:
    student, teacher, anchor = (make_model(make_levels(), V, seed) for seed in range(3))
    return student, teacher, anchor


def objective(models: Models, stored: Optional[StoredGuides] = None, **values: Any) -> GuidedObjective:
    return GuidedObjective(replace(CFG, **values), STEPS, SEED, *models, stored=stored)


def run(
    one: GuidedObjective, batches: RoundBatches, step: int, place: Place = ALONE
) -> Tuple[Tensor, Dict[str, Tensor]]:
    return one.loss(step, one.student, batches.batch(step, place))


def test_an_ordinary_step_is_the_sleep_loss_with_both_guides(models: Models, batches: RoundBatches) -> None:
    one = objective(models)
    for step in range(STEPS):
        batch = batches.batch(step)
        tokens, recent = batch.tokens_BS, batch.recent_B
        guides = guide_logits(models[1], models[2], tokens, recent)
        expected, parts = sleep_loss(models[0](tokens[:, :-1]), tokens, recent, guides, CFG)
        loss, found = run(one, batches, step)
        assert torch.equal(loss, expected) and found == parts
    assert one.trained_tokens == one.forward_tokens == STEPS * 8 * CONTEXT, "every sequence has one guide"


def test_without_guides_only_true_tokens_count(models: Models, batches: RoundBatches) -> None:
    one = GuidedObjective(replace(CFG, on_policy=1.0), STEPS, SEED, models[0])
    loss, parts = run(one, batches, 0)
    assert loss.item() == pytest.approx(models[0].nll(batches.batch(0).tokens_BS).mean().item(), rel=1e-6)
    assert set(parts) == {"truth_recent", "truth_old"} and one.forward_tokens == 0


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "topk"])
def test_stored_guides_teach_what_the_teacher_would(
    kind: str, models: Models, batches: RoundBatches, tmp_path: Path
) -> None:
    path, rows = tmp_path / "guides.arrow", batches.visited(STEPS)
    write_guides(path, models[1], batches.snapshot, rows, V)
    stored = objective(models, StoredGuides([path]), divergence=kind, top_k=V)
    fresh = objective(models, divergence=kind, top_k=V)
    for step in range(STEPS):
        (left, parts), (right, others) = run(stored, batches, step), run(fresh, batches, step)
        assert left.item() == pytest.approx(right.item(), rel=1e-3) and set(parts) == set(others)
        assert float(parts["teacher"]) == pytest.approx(float(others["teacher"]), rel=5e-3)
    assert stored.forward_tokens == fresh.forward_tokens / 2, "the teacher reads nothing, the anchor still does"
    write_guides(path, models[1], batches.snapshot, rows[:1], V)
    partly = objective(models, StoredGuides([path]), divergence=kind, top_k=V)
    assert torch.equal(run(partly, batches, 0)[0], run(fresh, batches, 0)[0]), "half a guide is none"


def test_divergences_and_k_are_those_configured(models: Models, batches: RoundBatches) -> None:
    found = {kind: float(run(objective(models, divergence=kind), batches, 1)[1]["teacher"]) for kind in ("jsd", "topk")}
    exact = float(run(objective(models), batches, 1)[1]["teacher"])
    assert found["topk"] == pytest.approx(exact, rel=1e-5), "32 tokens are all of 31"
    assert float(run(objective(models, divergence="topk", top_k=2), batches, 1)[1]["teacher"]) < 0.9 * exact
    wide = float(run(objective(models, divergence="jsd", jsd_beta=0.01), batches, 1)[1]["teacher"])
    assert wide == pytest.approx(0.01 * exact, rel=0.05) and found["jsd"] < 0.7


def test_a_falling_mixture_ends_with_true_tokens(models: Models, batches: RoundBatches) -> None:
    for kind in ("linear", "cosine"):
        first, _ = run(objective(models, mixing=kind), batches, 0)
        assert torch.equal(first, run(objective(models), batches, 0)[0])
        last, _ = run(objective(models, mixing=kind), batches, STEPS - 1)
        truth = models[0].nll(batches.batch(STEPS - 1).tokens_BS).mean()
        torch.testing.assert_close(last, truth, rtol=1e-6, atol=0)


def test_on_policy_steps_are_the_same_whatever_the_ranks(models: Models, batches: RoundBatches) -> None:
    one = objective(models, on_policy=1.0)
    for step in range(3):
        whole, parts = run(one, batches, step)
        assert set(parts) == {"on_policy_teacher", "on_policy_anchor"}
        shares = [run(one, batches, step, Place(rank, 2))[0] for rank in range(2)]
        torch.testing.assert_close(sum(shares) / 2, whole, rtol=1e-5, atol=0)
        assert torch.equal(run(objective(models, on_policy=1.0), batches, step)[0], whole), "and when it is repeated"
    rewarded = ImitationConfig(weight=0.5, cutoff=6)
    loss, parts = run(objective(models, on_policy=1.0, imitation=rewarded), batches, 0)
    assert set(parts) == {"on_policy_teacher", "on_policy_anchor", "reward_teacher", "reward_anchor"}
    assert loss.item() != run(one, batches, 0)[0].item() and 0 <= float(parts["reward_teacher"]) <= 1


def test_continuations_are_paid_for(models: Models, batches: RoundBatches) -> None:
    plain, rewarded = (
        objective(models, on_policy=1.0, imitation=ImitationConfig(weight=weight)) for weight in (0.0, 0.5)
    )
    for one in (plain, rewarded):
        run(one, batches, 0)
    length = plain.trained_tokens // 8
    assert length + 1 <= CONTEXT + 1 and plain.trained_tokens == 8 * length
    assert plain.forward_tokens == 2 * plain.trained_tokens, "the student continues, the guides read"
    assert rewarded.forward_tokens == 3 * plain.trained_tokens, "and continue"


@pytest.mark.parametrize(
    "values",
    [
        {"divergence": "reverse_kl"},
        {"divergence": "jsd"},
        {"divergence": "topk", "top_k": 4},
        {"on_policy": 1.0, "divergence": "reverse_kl"},
        {"on_policy": 1.0, "imitation": ImitationConfig(weight=0.3, cutoff=6)},
    ],
    ids=str,
)
def test_training_brings_the_student_nearer_to_its_guide(
    values: Dict[str, Any],
    make_model: Callable[..., NestedLM],
    make_levels: Callable[..., Dict[str, LevelConfig]],
    batches: RoundBatches,
) -> None:
    student, teacher = make_model(make_levels(), V, 0), make_model(make_levels(), V, 1)
    one = GuidedObjective(replace(CFG, teacher=1.0, anchor=1.0, **values), STUDY, SEED, student, teacher, teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    held_out = torch.randint(V, (32, CONTEXT), generator=torch.Generator().manual_seed(9))

    def distance() -> float:
        with torch.no_grad():
            return float(forward_kl(student(held_out), teacher(held_out)).mean())

    before = distance()
    for step in range(STUDY):
        loss, _ = run(one, batches, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert distance() < 0.9 * before
