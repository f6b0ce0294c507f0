"""Which parameters the learner writes: those of its own levels, or, where it trains everything itself, all of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Dict, List, Mapping

import torch
from torch import Tensor

from nl_model.flops import forward_flops, full_step_flops, wake_step_flops, write_flops
from nl_model.levelled import Levelled
from pipelines.config.schema import Config
from pipelines.wake.hooks import HookCosts

NOTHING = HookCosts()
HALVINGS = 60
"""Of the interval in which the trained share lies: down to a float's precision."""


def learner_writes(model: Levelled, cfg: Config) -> List[str]:
    """Names of the parameters that only the learner moves between two releases, in model order.

    A release has an offset for each of them, a mark pins them, a checkpoint holds them.
    """
    if cfg.wake.writes == "all":
        return [name for name, _ in model.named_parameters()]
    return model.owned_by("learner")


def held_parameters(model: Levelled, cfg: Config) -> Dict[str, Tensor]:
    """Copies of these parameters by name."""
    state = dict(model.named_parameters())
    return {name: state[name].detach().clone() for name in learner_writes(model, cfg)}


def no_offset(model: Levelled, cfg: Config, weights: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Offsets of a release that no round made: zero for each of them."""
    return {name: torch.zeros_like(weights[name]) for name in learner_writes(model, cfg)}


def wake_flops(cfg: Config, vocab_size: int, costs: HookCosts = NOTHING) -> float:
    """FLOPs per streamed token of a learner: it reads, writes its own levels, or trains all of them.

    Args:
        costs: of what is added to training (writes=all).
    """
    shape, wake = (cfg.model, cfg.levels, vocab_size), cfg.wake
    if wake.writes == "fast":
        return float(wake_step_flops(*shape))
    if wake.writes == "none":
        return float(forward_flops(*shape))
    unread = max(0.0, 1.0 - wake.trained * (1.0 - wake.replay))  # what is trained on is read with it
    read = unread * forward_flops(*shape) + costs.streamed
    return wake.trained * (full_step_flops(*shape) + costs.trained) + read + _writing(cfg, vocab_size, wake.trained)


def _writing(cfg: Config, vocab_size: int, trained: float) -> float:
    """FLOPs per streamed token of the writes of a learner that trains every level: one per wake step, or one per pass
    over its new text where it makes several. Its steps train on the whole numbers of sequences around the mean."""
    batch = cfg.wake.batch
    visits = trained * (1.0 - cfg.wake.replay) * batch
    fewest = math.floor(visits + 1e-9)
    share = max(0.0, visits - fewest)
    few, many = (max(1, math.ceil(number / batch)) for number in (fewest, fewest + 1))
    one = write_flops(cfg.model, cfg.levels, vocab_size, cfg.sleep.optimizer)
    return ((1.0 - share) * few + share * many) * one / (batch * cfg.model.context)


def pool_flops(cfg: Config, vocab_size: int) -> float:
    """FLOPs per token that a round trains on: a full step, its guide's pass, its share of the write."""
    sleep, shape = cfg.sleep, (cfg.model, cfg.levels, vocab_size)
    guided = sleep.recent * bool(sleep.teacher) + (1.0 - sleep.recent) * bool(sleep.anchor)
    write = write_flops(*shape, sleep.optimizer) / (sleep.batch * cfg.model.context)
    return full_step_flops(*shape) + guided * forward_flops(*shape) + write


def with_budget(cfg: Config, vocab_size: int, costs: HookCosts = NOTHING) -> Config:
    """The configuration with `sleep.epochs` spread over wake and sleep: the same FLOPs for every strategy.

    So many full training steps per streamed token are spent in all: reading the stream comes first, the rest is trained
    on, by the pool (`sleep.tokens_per_token`), or by the learner where it trains every level (`wake.trained`). The gate
    costs every strategy the same and comes on top; so do dreams and on-policy steps, whose cost no plan knows.

    Args:
        costs: of what is added to the learner's training; there is less of it then.
    """
    wake, sleep, shape = cfg.wake, cfg.sleep, (cfg.model, cfg.levels, vocab_size)
    if wake.writes == "all":
        sleep = replace(sleep, tokens_per_token=0.0)
    if not sleep.epochs:
        return replace(cfg, sleep=sleep)
    budget = sleep.epochs * full_step_flops(*shape)
    if wake.writes != "all":
        left = max(0.0, budget - wake_flops(cfg, vocab_size)) / pool_flops(cfg, vocab_size)
        return replace(cfg, sleep=replace(sleep, tokens_per_token=left, epochs=0.0))

    def training(share: float) -> Config:
        return replace(cfg, wake=replace(wake, trained=share), sleep=replace(sleep, epochs=0.0))

    least, most = 0.0, budget / (full_step_flops(*shape) + costs.trained)
    for _ in range(HALVINGS):
        middle = (least + most) / 2.0
        least, most = (middle, most) if wake_flops(training(middle), vocab_size, costs) < budget else (least, middle)
    return training(least)
