"""What rejections in a row change: a pure function of the decisions, undone by a promotion."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nl_model.config import OptimizerConfig
from pipelines.config.gate import GateConfig
from pipelines.config.sleep import SleepConfig
from pipelines.machine.replan import MOST, Adjustment, adjusted, adjustment

CFG = GateConfig()
YES, NO = "promoted", "rejected"


@pytest.mark.parametrize(
    ("decisions", "scale"),
    [
        ([], 1.0),
        ([NO], 1.0),
        ([NO, NO], 0.5),
        ([NO, NO, NO], 0.5),
        ([YES, NO, NO, NO, NO], 0.25),
        ([NO, NO, YES], 1.0),
        ([NO, NO, YES, NO], 1.0),
        ([NO] * 100, 0.5**MOST),
    ],
)
def test_every_second_rejection_in_a_row_halves(decisions: list[str], scale: float) -> None:
    found = adjustment(decisions, CFG)
    assert (found.recent_scale, found.lr_scale) == (scale, scale)
    assert (found == Adjustment()) == (scale == 1.0)


def test_patience_and_factors_are_settings() -> None:
    found = adjustment([NO] * 3, GateConfig(patience=3, recent_factor=0.8, step_factor=0.1))
    assert found == Adjustment(0.8, 0.1, 3)


def test_a_round_is_planned_with_the_factors() -> None:
    cfg = SleepConfig(batch=8, recent=0.5, optimizer=OptimizerConfig(lr=2e-3))
    assert adjusted(cfg, 1.0, 1.0) is cfg
    found = adjusted(cfg, 0.5, 0.5)
    assert found.recent == 0.25 and found.optimizer.lr == 1e-3
    assert replace(found, recent=0.5, optimizer=cfg.optimizer) == cfg, "nothing else changes"


def test_something_recent_stays_in_every_batch() -> None:
    cfg = SleepConfig(batch=8, recent=0.5)
    assert round(adjusted(cfg, 0.5**MOST, 1.0).recent * cfg.batch) == 1
    assert adjusted(replace(cfg, recent=0.0), 0.5, 0.5).recent == 0.0
