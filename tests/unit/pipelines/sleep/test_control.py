"""The control: the same stream in the same order, and no more FLOPs than it is given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import pytest
import torch

from nl_model.config import LevelConfig, OptimizerConfig
from nl_model.flops import full_step_flops
from nl_model.model import NestedLM
from pipelines.config.schema import Config, WakeConfig
from pipelines.data.module import Setting, open_setting
from pipelines.gate.probe import Row, score
from pipelines.sleep.control import blocks_of, train_control

Make = Callable[..., NestedLM]


@pytest.fixture
def setting(make_config: Callable[..., Config]) -> Setting:
    """200 sequences of 16 tokens; the pool's level is due every 32 sequences."""
    return open_setting(make_config())


def in_order(setting: Setting) -> np.ndarray:
    """Tokens of all sequences that a learner would see."""
    stream, held = setting.stream(), []
    while batch := stream.next_batch(setting.cfg.wake.batch):
        held += [s.tokens for s in batch]
    return np.stack(held)


@pytest.mark.parametrize("period", [512, 256, 1600, 1696, 100_000])
def test_blocks_are_the_stream_in_order_and_about_a_period_long(setting: Setting, period: int) -> None:
    blocks, expected = list(blocks_of(setting.stream(), period, setting.cfg)), in_order(setting)
    assert np.array_equal(np.concatenate(blocks), expected)
    per_block = period // 16
    assert all(len(block) == per_block for block in blocks[:-1])
    assert len(blocks[-1]) < per_block + max(1, per_block // 10) and len(blocks[-1]) >= min(
        len(expected), per_block // 10
    )


def test_a_short_rest_joins_the_last_block(setting: Setting) -> None:
    whole = len(in_order(setting))
    assert whole % 2 == 0
    sizes = [len(b) for b in blocks_of(setting.stream(), (whole - 2) * 16, setting.cfg)]
    assert sizes == [whole]
    assert [len(b) for b in blocks_of(setting.stream(), whole * 16, setting.cfg)] == [whole]
    sizes = [len(b) for b in blocks_of(setting.stream(), whole // 2 * 16, setting.cfg)]
    assert sizes == [whole // 2] * 2


def trained(
    setting: Setting, model: NestedLM, flops_per_token: float, lr: float = 3e-3
) -> Tuple[List[Row], float, List[Row], List[int]]:
    rows: List[Row] = []
    steps: List[int] = []
    result, flops = train_control(
        model,
        setting.stream(),
        setting.probes(),
        setting.sources,
        setting.cfg,
        lr,
        flops_per_token,
        rows.append,
        steps.append,
    )
    return result, flops, rows, steps


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0, 1.37])
def test_the_budget_is_spent_to_within_a_step(setting: Setting, make_model: Make, share: float) -> None:
    model = make_model(setting.cfg.levels)
    full = full_step_flops(setting.cfg.model, setting.cfg.levels, 257)
    tokens = len(in_order(setting)) * 16
    rows, flops, seen, steps = trained(setting, model, share * full)
    step = full * setting.cfg.sleep.batch * 16
    budget = share * full * tokens
    assert budget - step < flops <= budget
    assert steps == list(range(1, len(steps) + 1)) and flops == len(steps) * step
    assert rows == seen


def test_there_is_a_row_for_the_base_and_for_every_block(setting: Setting, make_model: Make) -> None:
    base, model = make_model(setting.cfg.levels), make_model(setting.cfg.levels)
    full = full_step_flops(setting.cfg.model, setting.cfg.levels, 257)
    rows, *_ = trained(setting, model, full)
    ends = np.cumsum([len(block) for block in blocks_of(setting.stream(), 512, setting.cfg)]) * 16
    assert [row.release for row in rows] == list(range(len(ends) + 1))
    assert [row.tokens for row in rows] == [0, *ends.tolist()]
    assert rows[0].bpb == score(base, setting.probes(), setting.sources)
    assert list(rows[0].bpb) == ["a", "b", "c"]
    assert rows[-1].bpb == score(model, setting.probes(), setting.sources)
    assert rows[-1].bpb["c"] < rows[0].bpb["c"] - 0.5, "the control learns"
    changed = [not torch.equal(p, q) for p, q in zip(base.parameters(), model.parameters(), strict=True)]
    assert all(changed), "every parameter is trained"


def spy(model: NestedLM) -> List[np.ndarray]:
    """Tokens of every training batch the model sees, probes left out."""
    seen: List[np.ndarray] = []

    def note(_module: torch.nn.Module, inputs: Tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            seen.append(inputs[0].numpy().copy())

    model.register_forward_pre_hook(note)
    return seen


def test_the_control_trains_on_the_stream_in_its_order(setting: Setting, make_model: Make) -> None:
    model = make_model(setting.cfg.levels)
    seen = spy(model)
    trained(setting, model, full_step_flops(setting.cfg.model, setting.cfg.levels, 257))
    expected = in_order(setting)[:, :-1]
    found = np.concatenate(seen)
    assert len(expected) - len(found) < 4, "a rest shorter than one batch may be left over"
    assert np.array_equal(found, expected[: len(found)])


def test_more_flops_are_further_passes_over_the_same_block(setting: Setting, make_model: Make) -> None:
    model = make_model(setting.cfg.levels)
    seen = spy(model)
    trained(setting, model, 2 * full_step_flops(setting.cfg.model, setting.cfg.levels, 257))
    first = in_order(setting)[:32, :-1]
    assert np.array_equal(np.concatenate(seen[:16]), np.concatenate([first, first]))


def test_a_batch_larger_than_a_block_is_trained_on_all_the_same(
    make_config: Callable[..., Config], make_model: Make, make_levels: Callable[..., Dict[str, LevelConfig]]
) -> None:
    config = make_config(levels=make_levels(32, 32, 64), wake=WakeConfig(batch=2))
    config = replace(config, sleep=replace(config.sleep, batch=8))
    setting = open_setting(config)
    rows, flops, *_ = trained(setting, make_model(config.levels), full_step_flops(config.model, config.levels, 257))
    assert flops > 0 and rows[-1].tokens == len(in_order(setting)) * 16


def test_two_controls_are_equal(setting: Setting, make_model: Make) -> None:
    one, two = make_model(setting.cfg.levels), make_model(setting.cfg.levels)
    full = full_step_flops(setting.cfg.model, setting.cfg.levels, 257)
    assert trained(setting, one, full)[:2] == trained(setting, two, full)[:2]
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_no_step_size_leaves_the_base(make_config: Callable[..., Config], make_model: Make) -> None:
    config = make_config()
    config = replace(config, sleep=replace(config.sleep, optimizer=OptimizerConfig(weight_decay=0.1)))
    setting = open_setting(config)
    full = full_step_flops(config.model, config.levels, 257)
    rows, flops, *_ = trained(setting, make_model(config.levels), 0.5 * full, lr=0.0)
    assert flops > 0 and all(row.bpb == rows[0].bpb for row in rows)
