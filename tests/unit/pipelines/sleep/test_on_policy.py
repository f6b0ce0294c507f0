"""On-policy steps: sampling that is a function of keys, the reward of check 26, and gradients written out by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, Callable, Dict, List, Sequence, Tuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nl_model.config import LevelConfig
from nl_model.distillation import forward_kl
from nl_model.generate import SamplingConfig, complete
from nl_model.losses import token_nll
from nl_model.model import NestedLM
from pipelines.config.sleep import ImitationConfig, SleepConfig
from pipelines.sleep.on_policy import (
    GUIDE,
    STUDENT,
    Continuation,
    advantage,
    continue_text,
    imitation_reward,
    levenshtein,
    on_policy_loss,
    prompt_length,
    surface_reward,
    uniforms,
)

CONTEXT, V, B, P, N = 16, 31, 6, 7, 5
CFG = SleepConfig(teacher=0.4, anchor=0.3, on_policy=0.5, continuation=N)
Make = Callable[..., NestedLM]


@pytest.fixture
def models(make_model: Make, make_levels: Callable[..., Dict[str, LevelConfig]]) -> List[NestedLM]:
    """Student, teacher, anchor."""
    return [make_model(make_levels(), V, seed) for seed in range(3)]


def prompts(rows: int = B) -> Tensor:
    return torch.randint(V, (rows, P), generator=torch.Generator().manual_seed(1))


KEYS = np.array([5, -3, 12, 99, 0, 7])


def test_the_kind_of_a_step_is_drawn_by_its_seed() -> None:
    stored = CONTEXT + 1
    drawn = [prompt_length(CFG, stored, 4, step) for step in range(400)]
    assert drawn == [prompt_length(CFG, stored, 4, step) for step in range(400)]
    assert drawn != [prompt_length(CFG, stored, 5, step) for step in range(400)]
    share = sum(map(bool, drawn)) / len(drawn)
    assert abs(share - 0.5) < 0.08
    assert set(drawn) - {0} == set(range((stored - N) // 2, stored - N + 1)), "room for the continuation, always"
    assert {prompt_length(replace(CFG, on_policy=0.0), stored, 4, step) for step in range(50)} == {0}
    assert all(prompt_length(replace(CFG, on_policy=1.0), stored, 4, step) for step in range(50))
    tightest = replace(CFG, on_policy=1.0, continuation=CONTEXT - 1)
    assert {prompt_length(tightest, stored, 4, step) for step in range(9)} == {2}


def test_text_depends_on_keys_and_not_on_ranks(models: List[NestedLM]) -> None:
    draws = uniforms(3, 8, KEYS, N, STUDENT)
    assert draws.shape == (B, N) and float(draws.min()) >= 0 and float(draws.max()) < 1
    whole = continue_text(models[0], prompts(), draws)
    for rank in range(2):
        share = continue_text(models[0], prompts()[rank::2], uniforms(3, 8, KEYS[rank::2], N, STUDENT))
        assert torch.equal(share.sequences_BS, whole.sequences_BS[rank::2])
    others: Sequence[Tuple[Any, ...]] = [(4, 8, KEYS, N, STUDENT), (3, 9, KEYS, N, STUDENT), (3, 8, KEYS, N, GUIDE)]
    for other in others:
        assert not np.isin(uniforms(*other), draws).any()
    assert uniforms(3, 8, KEYS[:0], N, STUDENT).shape == (0, N)
    assert continue_text(models[0], prompts(0), uniforms(3, 8, KEYS[:0], N, STUDENT)).sequences_BS.shape == (0, P + N)


def test_speaking_follows_the_model(models: List[NestedLM]) -> None:
    model = models[0]
    mine = continue_text(model, prompts(), uniforms(3, 8, KEYS, N, STUDENT))
    assert mine.prompt == P and torch.equal(mine.sequences_BS[:, :P], prompts())
    with torch.no_grad():
        nll = model.nll(mine.sequences_BS)[:, P - 1 :]
    torch.testing.assert_close(mine.log_p_Bn.float(), -nll, rtol=1e-4, atol=1e-5)
    likely = continue_text(model, prompts(), np.zeros((B, 1))).sequences_BS[:, -1]
    assert torch.equal(likely, torch.zeros(B, dtype=torch.int64)), "the first token has the lowest numbers"
    draws = (np.arange(4000)[:, None] + 0.5) / 4000
    one = continue_text(model, prompts(1).expand(4000, P), draws).sequences_BS[:, -1]
    with torch.no_grad():
        expected = model(prompts(1))[0, -1].softmax(-1)
    torch.testing.assert_close(torch.bincount(one, minlength=V) / 4000, expected, rtol=0, atol=1 / 4000)


def test_a_sharp_model_says_what_generation_says(models: List[NestedLM]) -> None:
    model = models[0]
    with torch.no_grad():
        model.head.weight.mul_(1e7)
    mine = continue_text(model, prompts(), uniforms(3, 8, KEYS, N, STUDENT))
    assert torch.equal(mine.sequences_BS, complete(model, prompts(), N, SamplingConfig(temperature=0.0)))


def test_check_26_no_gradient_flows_through_sampling(models: List[NestedLM]) -> None:
    """Check 26: nothing is kept for a backward pass while the student speaks; its text is a constant to the loss."""
    student, teacher, _ = models
    kept: List[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mine = continue_text(student, prompts(), uniforms(3, 8, KEYS, N, STUDENT))
    assert kept == [] and mine.log_p_Bn.grad_fn is None and not mine.sequences_BS.requires_grad
    recent = torch.ones(B, dtype=torch.bool)
    gradients = []
    for text in (mine, Continuation(mine.sequences_BS.clone(), P, torch.zeros(B, N))):
        with torch.no_grad():
            guides = {"teacher": teacher(text.sequences_BS[:, :-1])}
        rewards = {"teacher": torch.linspace(0, 1, B)}
        cfg = replace(CFG, imitation=ImitationConfig(weight=0.5))
        loss, _ = on_policy_loss(student(text.sequences_BS[:, :-1]), text, recent, guides, rewards, cfg)
        gradients.append(torch.autograd.grad(loss, list(student.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(p.grad is None for p in teacher.parameters())


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """By the textbook recursion."""
    table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i, j in itertools.product(range(1, len(a) + 1), range(1, len(b) + 1)):
        change = table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
        table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, change)
    return table[len(a), len(b)]


@given(
    pairs=st.integers(0, 7).flatmap(lambda n: st.integers(0, 7).flatmap(lambda m: st.lists(_pair(n, m), max_size=4)))
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_levenshtein_is_the_edit_distance_of_every_row(pairs: List[Tuple[List[int], List[int]]]) -> None:
    if not pairs:
        return
    a = np.array([left for left, _ in pairs], np.int64).reshape(len(pairs), -1)
    b = np.array([right for _, right in pairs], np.int64).reshape(len(pairs), -1)
    assert levenshtein(a, b).tolist() == [edit_distance(left, right) for left, right in pairs]


def _pair(n: int, m: int) -> st.SearchStrategy[Tuple[List[int], List[int]]]:
    token = st.integers(0, 3)
    return st.tuples(st.lists(token, min_size=n, max_size=n), st.lists(token, min_size=m, max_size=m))


def test_check_26_identical_texts_earn_1_and_those_beyond_the_cutoff_0() -> None:
    """Check 26: r_abs is 1 for identical strings, and 0 where the distance is above z0."""
    text = np.arange(10)
    rows = np.stack([text, np.where(text < 3, 50, text), np.where(text < 4, 50, text), text + 50, np.roll(text, 1)])
    assert levenshtein(rows, np.tile(text, (5, 1))).tolist() == [0, 3, 4, 10, 2]
    found = surface_reward(rows, np.tile(text, (5, 1)), cutoff=3)
    assert found.tolist() == [1.0, 0.7, 0.0, 0.0, 0.8]
    assert surface_reward(rows[:, :5], np.tile(text, (5, 1)), cutoff=5)[0] == 0.5, "the longer one counts"


def test_the_semantic_reward_is_the_guides_own_verdict(models: List[NestedLM]) -> None:
    _, teacher, _ = models
    own = continue_text(teacher, prompts(), uniforms(3, 8, KEYS, N, GUIDE))
    odd = own.sequences_BS.clone()
    with torch.no_grad():
        unlikely = teacher(own.sequences_BS[:, :-1])[:, -1].argmin(-1)
        odd[:, -1] = torch.where(torch.arange(B) % 2 == 0, unlikely, odd[:, -1])
        logits = teacher(odd[:, :-1])
    mine = Continuation(odd, P, torch.zeros(B, N))
    reward = imitation_reward(mine, logits, own, ImitationConfig(semantic=1.0, threshold=0.01))
    assert reward.dtype == torch.float32 and set(reward.tolist()) <= {0.0, 1.0}
    assert bool((reward[1::2] == 1).all()), "its own text contents it"
    drop = own.log_p_Bn[:, -1] - logits[:, -1].double().log_softmax(-1).gather(1, odd[:, -1:])[:, 0]
    assert torch.equal(reward[::2] == 0, drop[::2] / N > 0.01) and float(reward.min()) == 0
    assert bool((imitation_reward(mine, logits, own, ImitationConfig(semantic=1.0, threshold=1e3)) == 1).all())
    mixed = imitation_reward(mine, logits, own, ImitationConfig(semantic=0.25, threshold=0.01, cutoff=N))
    changed = odd[:, -1] != own.sequences_BS[:, -1]
    torch.testing.assert_close(mixed, 0.25 * reward + 0.75 * torch.where(changed, 1 - 1 / N, 1.0))


def test_the_baseline_of_a_sequence_is_the_mean_of_the_others() -> None:
    reward = torch.tensor([1.0, 0.0, 0.5, 0.25])
    assert advantage(reward).tolist() == pytest.approx([0.75, -0.4375 - 0.4375 / 3, 0.5 - 1.25 / 3, 0.25 - 0.5])
    assert advantage(torch.full((3,), 0.7)).abs().max() < 1e-6, "equal rewards teach nothing"
    assert advantage(torch.tensor([0.7])).tolist() == pytest.approx([0.7])


def test_the_loss_is_the_formula(models: List[NestedLM]) -> None:
    student, teacher, anchor = models
    recent = torch.tensor([True, True, True, False, False, False])
    mine = continue_text(student, prompts(), uniforms(3, 8, KEYS, N, STUDENT))
    inputs, targets = mine.sequences_BS[:, :-1], mine.sequences_BS[:, 1:]
    with torch.no_grad():
        guides = {"teacher": teacher(inputs[recent]), "anchor": anchor(inputs[~recent])}
        logits, nll = student(inputs), token_nll(student(inputs), targets)
    rewards = {"teacher": torch.tensor([1.0, 0.0, 0.5]), "anchor": torch.tensor([0.0, 0.0, 0.9])}
    for share, factor in ((0.0, 1.0), (0.25, 1.0), (1.0, 0.5)):
        cfg = replace(CFG, imitation=ImitationConfig(weight=share))
        given_rewards = rewards if share else {}
        loss, parts = on_policy_loss(logits, mine, recent, guides, given_rewards, cfg, factor)
        expected = 0.0
        for name, rows, weight in (("teacher", slice(0, 3), 0.4 * factor), ("anchor", slice(3, 6), 0.3 * factor)):
            truth = nll[rows, : P - 1].mean(1)
            diverged = forward_kl(logits[rows, P - 1 :], guides[name][:, P - 1 :]).mean(1)
            rewarded = advantage(rewards[name]) * nll[rows, P - 1 :].mean(1)
            expected += float(((1 - weight) * truth + weight * ((1 - share) * diverged + share * rewarded)).sum())
            assert float(parts[f"on_policy_{name}"]) == pytest.approx(float(diverged.mean()), rel=1e-5)
        assert float(loss) == pytest.approx(expected / B, rel=1e-5)
        assert ("reward_anchor" in parts) == bool(share)
    alone, parts = on_policy_loss(logits, mine, recent, {"anchor": guides["anchor"]}, {}, CFG)
    assert set(parts) == {"on_policy_anchor"} and float(alone) != float(loss)


def test_the_reward_reaches_the_student_as_its_true_gradient() -> None:
    """The expected gradient, over every text of two tokens by its probability, is that of the expected reward."""
    size, count = 4, 2
    logits = torch.randn(count, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    mine = torch.tensor(list(itertools.product(range(size), repeat=count)))
    reward = torch.rand(len(mine), generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def probability() -> Tensor:
        return logits.log_softmax(-1).expand(len(mine), -1, -1).gather(2, mine[:, :, None])[..., 0].sum(1).exp()

    (exact,) = torch.autograd.grad((probability() * reward).sum(), logits)
    weights = probability().detach()
    total = torch.zeros_like(logits)
    everything = replace(CFG, teacher=1.0, imitation=ImitationConfig(weight=1.0))
    for (i, one), (j, two) in itertools.product(enumerate(mine), repeat=2):  # a batch of two independent texts
        text = Continuation(
            torch.cat((torch.zeros(2, 2, dtype=torch.int64), torch.stack((one, two))), 1), 2, torch.zeros(2, 2)
        )
        full = torch.cat((torch.zeros(1, size, dtype=torch.float64), logits))[None].expand(2, -1, -1)
        guides, rewards = {"teacher": torch.zeros(2, 3, size)}, {"teacher": reward[[i, j]]}
        loss, _ = on_policy_loss(full, text, torch.tensor([True, True]), guides, rewards, everything)
        total += weights[i] * weights[j] * torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(-total * count, exact, rtol=1e-10, atol=1e-12)
