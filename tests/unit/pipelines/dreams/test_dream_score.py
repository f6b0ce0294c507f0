"""Scores of dreams, and the reward loop: it keeps what helps on held-out experience and drops noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict

import numpy as np
import pytest
import torch
from torch import Tensor

import pipelines.dreams.dream
from nl_model.config import LevelConfig
from nl_model.model import NestedLM
from pipelines.config.dreams import DreamConfig
from pipelines.dreams.dream import Dream, dream
from pipelines.dreams.score import Tail, gradient_norms, learning_progress, rewards, trained_copy
from pipelines.experience import ExperienceStore, Record, Snapshot
from pipelines.sleep.plan import RoundPlan

CONTEXT, PROMPT = 16, 5
CFG = DreamConfig(reward_lr=0.01, reward_steps=2)


@pytest.fixture
def model(make_model: Callable[..., NestedLM], make_levels: Callable[..., Dict[str, LevelConfig]]) -> NestedLM:
    return make_model(make_levels(), 257, 1, torch.float64)


def sequences(count: int, seed: int) -> Tensor:
    return torch.randint(0, 257, (count, CONTEXT + 1), generator=torch.Generator().manual_seed(seed))


def test_the_gradient_norm_is_autograds_on_the_last_block(model: NestedLM) -> None:
    tokens, norms = sequences(3, 0), []
    for row in tokens:
        model.zero_grad()
        model.nll(row[None])[:, PROMPT - 1 :].mean().backward()
        gradients = [p.grad for p in model.blocks[-1].parameters() if p.grad is not None]
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
    assert gradient_norms(Tail(model, tokens), range(3), PROMPT, CFG) == pytest.approx(norms, rel=1e-6)


def test_learning_progress_is_the_gradient_norm_to_first_order(model: NestedLM) -> None:
    tokens, cfg = sequences(4, 1), replace(CFG, reward_lr=1e-6)
    size = float(torch.cat([p.detach().flatten() for p in model.blocks[-1].parameters()]).norm())
    expected = [1e-6 * size * norm for norm in gradient_norms(Tail(model, tokens), range(4), PROMPT, cfg)]
    assert learning_progress(Tail(model, tokens), range(4), PROMPT, cfg) == pytest.approx(expected, rel=1e-3)


def test_a_rewarded_copy_has_learned_and_the_model_has_not(model: NestedLM) -> None:
    tokens = sequences(2, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = float(model.nll(tokens).mean().detach())
    dreamer = trained_copy(model, tokens, CFG)
    assert float(dreamer.nll(tokens).mean().detach()) < loss
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    changed = {name for name, p in dreamer.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith("blocks.1.") for name in changed), "only the last block is trained"


def pattern(count: int, seed: int) -> np.ndarray:
    """Sequences that count upwards, wherever they begin."""
    starts = np.random.default_rng(seed).integers(0, 40, count)
    return (starts[:, None] + np.arange(CONTEXT + 1)) % 40


def noise(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 40, (count, CONTEXT + 1))


def half_trained(model: NestedLM) -> NestedLM:
    """Knows that tokens lie below 40 and a little of how they follow."""
    parameters = list(model.parameters())
    for step in range(40):
        texts = np.concatenate([noise(6, step), pattern(2, step)])
        gradients = torch.autograd.grad(model.nll(torch.from_numpy(texts)).mean(), parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=-0.5)
    return model


def test_a_useful_dream_is_rewarded_and_noise_is_not(model: NestedLM) -> None:
    half_trained(model)
    held = torch.from_numpy(pattern(24, 1000))
    gains = rewards(model, torch.from_numpy(np.concatenate([pattern(4, 2000), noise(4, 2000)])), held, CFG)
    assert min(gains[:4]) > 0 > max(gains[4:]), gains


def test_the_loop_keeps_what_helps(model: NestedLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Useful and useless candidates side by side, through filters, choice and reward."""
    half_trained(model)
    with ExperienceStore.open(tmp_path / "store", CONTEXT, "uint16") as store:
        store.append([Record(key=k, source="s", surprise=1.0 + k, tokens=t) for k, t in enumerate(pattern(80, 3000))])
        store.commit()
    texts = np.concatenate([pattern(5, 4000), noise(5, 4000)])
    asked = []

    def generate(dreamer: NestedLM, *_: object) -> list[Dream]:
        asked.append(dreamer)
        return [Dream(t, (n,), PROMPT, f"{'useful' if n < 5 else 'noise'}") for n, t in enumerate(texts)]

    monkeypatch.setattr(pipelines.dreams.dream, "generate_dreams", generate)
    cfg = replace(CFG, cap=1.0, keep_top=99, measure=24, band=99.0, max_copied=1.0, reward_rounds=1)
    round_plan = RoundPlan(1, 1, 0, 79, "fast", 0, 0, 4, 1)
    snapshot = Snapshot.open(tmp_path / "store")
    night = dream(model, snapshot, round_plan, cfg)
    assert [d.way for d in night.dreams] == ["useful"] * 5 and night.rejected == {"useless": 5}
    assert all(d.reward is not None and d.reward > 0 for d in night.dreams)
    again = dream(model, snapshot, round_plan, replace(cfg, reward_rounds=2, keep_top=7, keep_random=0))
    assert asked[1] is model and asked[2] is not model, "the second turn dreams with a copy trained on the first's"
    assert len(again.dreams) == 7 and again.generated == 20 == 7 + sum(again.rejected.values())
    assert [d.reward for d in again.dreams] == sorted((d.reward or 0.0 for d in again.dreams), reverse=True)
