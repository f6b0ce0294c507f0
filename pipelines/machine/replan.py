"""What changes when the gate rejects again and again: more replay and a smaller step size, until a promotion."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Sequence

from pipelines.config.gate import GateConfig
from pipelines.config.sleep import SleepConfig

MOST = 4
"""Most changes in a row; from then on the plan stays as careful as it is."""


@dataclass(frozen=True)
class Adjustment:
    """Factors of a round's plan."""

    recent_scale: float = 1.0
    """Factor of sleep.recent."""
    lr_scale: float = 1.0
    """Factor of sleep.optimizer.lr."""
    rejections: int = 0
    """Rejections in a row that led to it."""


def adjustment(decisions: Sequence[str], cfg: GateConfig) -> Adjustment:
    """The factors that the rounds so far call for: a pure function of their decisions, in order."""
    rejections = 0
    for decision in reversed(decisions):
        if decision == "promoted":
            break
        rejections += 1
    changes = min(rejections // cfg.patience, MOST)
    return Adjustment(cfg.recent_factor**changes, cfg.step_factor**changes, changes * cfg.patience)


def adjusted(cfg: SleepConfig, recent_scale: float, lr_scale: float) -> SleepConfig:
    """The settings of a round with these factors. At least one recent experience stays in a batch that had one."""
    if recent_scale == lr_scale == 1.0:
        return cfg
    recent = max(cfg.recent * recent_scale, min(cfg.recent, 1.0 / cfg.batch))
    return replace(cfg, recent=recent, optimizer=replace(cfg.optimizer, lr=cfg.optimizer.lr * lr_scale))
