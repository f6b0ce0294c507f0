"""The FLOP formulas against torch's own counter, to the last FLOP.

The counter has no formula for the CPU's fused attention, so attention runs as plain matrix products here. Those keep
the scores for the backward pass; the fused kernels that the formulas describe compute them once more.
"""

from __future__ import annotations

from typing import Callable, Dict, Tuple

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nl_model.config import LevelConfig, ModelConfig, ordered_levels
from nl_model.flops import forward_flops, full_step_flops, sleep_step_flops, wake_step_flops
from nl_model.model import NestedLM
from nl_model.slots import SlotConfig, activate, add_slots

Levels = Dict[str, LevelConfig]
BATCH, VOCAB = 3, 19


def levels(fast: str, medium: str, slow: str = "all") -> Levels:
    return {
        "fast": LevelConfig(period=4, width=6, blocks=fast),
        "medium": LevelConfig(period=8, width=10, blocks=medium),
        "slow": LevelConfig(period=16, width=14, blocks=slow, owner="pool"),
    }


CASES: Dict[str, Tuple[ModelConfig, Levels]] = {
    "default places": (ModelConfig(12, 4, 3, 8), levels("last_quarter", "last_quarter")),
    "fast in the last half": (ModelConfig(12, 4, 3, 8), levels("last_half", "3")),
    "medium below fast": (ModelConfig(16, 4, 2, 6), levels("3", "1")),
    "learner everywhere": (ModelConfig(8, 3, 2, 12), levels("all", "all")),
    "learner at the bottom only": (ModelConfig(8, 3, 4, 5), levels("0", "0")),
    "slow below only": (ModelConfig(8, 5, 1, 7), levels("2,4", "3", slow="0,1")),
    "one block": (ModelConfig(8, 1, 2, 9), levels("all", "all")),
}


@pytest.fixture(params=list(CASES.values()), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Tuple[ModelConfig, Levels]:
    found: Tuple[ModelConfig, Levels] = request.param
    return found


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def sequences(cfg: ModelConfig) -> torch.Tensor:
    return torch.randint(VOCAB, (BATCH, cfg.context + 1), generator=torch.Generator().manual_seed(0))


def test_forward(case: Tuple[ModelConfig, Levels], make_model: Callable[..., NestedLM]) -> None:
    cfg, where = case
    model = make_model(where, VOCAB, shape=cfg)
    assert forward_flops(cfg, where, VOCAB) * BATCH * cfg.context == counted(lambda: model.nll(sequences(cfg)))


def test_full_step(case: Tuple[ModelConfig, Levels], make_model: Callable[..., NestedLM]) -> None:
    cfg, where = case
    model = make_model(where, VOCAB, shape=cfg)
    recomputed = cfg.blocks * 2 * cfg.context * cfg.dim
    found = counted(lambda: model.nll(sequences(cfg)).sum().backward())
    assert (full_step_flops(cfg, where, VOCAB) - recomputed) * BATCH * cfg.context == found


def test_wake_step(case: Tuple[ModelConfig, Levels], make_model: Callable[..., NestedLM]) -> None:
    cfg, where = case
    model = make_model(where, VOCAB, shape=cfg).train_only("learner")
    learner = [name for name in ordered_levels(where) if where[name].owner == "learner"]
    lowest = min(block for name in learner for block in where[name].block_indices(cfg.blocks))
    recomputed = (cfg.blocks - 1 - lowest) * 2 * cfg.context * cfg.dim
    found = counted(lambda: model.nll(sequences(cfg)).sum().backward())
    assert (wake_step_flops(cfg, where, VOCAB) - recomputed) * BATCH * cfg.context == found


def test_a_wake_step_is_cheaper_than_a_full_step(case: Tuple[ModelConfig, Levels]) -> None:
    cfg, where = case
    assert forward_flops(cfg, where, VOCAB) < wake_step_flops(cfg, where, VOCAB) < full_step_flops(cfg, where, VOCAB)


@pytest.mark.parametrize("receiver", ["medium", "slow"])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_sleep_step_that_trains_one_level(
    case: Tuple[ModelConfig, Levels], make_model: Callable[..., NestedLM], receiver: str, rank: int
) -> None:
    """Its own weights, or new slots in its MLPs."""
    cfg, where = case
    model, lowest = make_model(where, VOCAB, shape=cfg), min(where[receiver].block_indices(cfg.blocks))
    if rank:
        trained = set(activate(add_slots(model, [receiver], SlotConfig(1, rank)), receiver, 0, seed=0))
    else:
        trained = set(model.parameters_of(receiver))
        lowest = -1 if receiver == "slow" else lowest
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    recomputed = min(cfg.blocks, cfg.blocks - 1 - lowest) * 2 * cfg.context * cfg.dim
    found = counted(lambda: model.nll(sequences(cfg)).sum().backward())
    assert (sleep_step_flops(cfg, where, VOCAB, [receiver], rank) - recomputed) * BATCH * cfg.context == found
