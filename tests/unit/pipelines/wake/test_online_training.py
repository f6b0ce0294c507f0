"""Online training at any budget: what is due is trained on in whole passes, and costs what it is meant to."""

from __future__ import annotations

from typing import Callable, List

import numpy as np
import pytest
import torch
from torch import Tensor

from nl_model.model import NestedLM
from pipelines.config.schema import Config, WakeConfig
from pipelines.experience import Record
from pipelines.experience.memory import MemoryStore
from pipelines.wake.online_training import OnlineTraining
from pipelines.wake.writes import wake_flops

B, CONTEXT, STEPS = 4, 16, 40


@pytest.mark.parametrize("replay", [0.0, 0.35])
@pytest.mark.parametrize("trained", [0.3, 1.0, 1.13, 1.9, 2.0, 3.7])
def test_every_budget_is_spent_and_all_new_text_is_scored_before_it_is_learned_from(
    trained: float, replay: float, make_config: Callable[..., Config], make_model: Callable[..., NestedLM]
) -> None:
    cfg = make_config(wake=WakeConfig(batch=B, writes="all", trained=trained, replay=replay))
    model, store = make_model(cfg.levels), MemoryStore(CONTEXT, "uint16")
    training = OnlineTraining(model, cfg, store.at)
    generator, flops = np.random.default_rng(0), 0.0
    scored: List[int] = []
    for step in range(STEPS):
        keys, before = B * step + np.arange(B), training.steps
        tokens = generator.integers(0, 257, (B, CONTEXT + 1))
        new_BS = torch.from_numpy(tokens)
        with torch.no_grad():
            expected_B = model.nll(new_BS).mean(1)

        def note(logits: Tensor, nll: Tensor, expected_B: Tensor = expected_B, before: int = before) -> Tensor:
            assert torch.allclose(nll.detach().mean(1), expected_B, atol=1e-5) and training.steps == before
            scored.append(len(nll))
            return torch.isfinite(nll.mean(1))

        flops += training.step(new_BS, keys, note, lambda: None)
        rows = zip(keys, tokens, strict=True)
        store.append([Record(key=int(k), source="s", tokens=row.astype(np.uint16)) for k, row in rows])
    assert scored == [B] * STEPS
    per_token = wake_flops(cfg, model.vocab_size)
    assert flops == pytest.approx(per_token * STEPS * B * CONTEXT, rel=2.0 / STEPS), "up to what is still due"
    assert -1e-6 < training.trained < B + 1, "no more than a pass is still due"
