"""The gate on real candidates: every kind of planted bad one is blocked, honest ones go live."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, List, Tuple

import pytest

from benchmarks.gate import case
from benchmarks.honest import Found, HonestRun
from benchmarks.planted import PLANTS, judge_planted
from nl_model.config import ModelConfig
from pipelines.config.schema import BaseConfig, Config, SleepConfig
from pipelines.gate.decision import Decision


@pytest.fixture(scope="module")
def story(
    make_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory
) -> Tuple[HonestRun, Found, List[Decision]]:
    """A run with two honest nights behind it, and the candidate of the third."""
    cfg = make_config(
        model=ModelConfig(dim=16, blocks=2, heads=2, context=16),
        base=BaseConfig(sources=["a"], tokens=16 * 16 * 150, batch=8, lr=1e-2),
        sleep=SleepConfig(batch=8, tokens_per_token=8.0, schedule="cosine", carry="nothing", average=0),
    )
    run, decisions = HonestRun(cfg, tmp_path_factory.mktemp("small")), []
    while run.wake():
        found = run.sleep()
        if len(decisions) == 2:
            break
        decisions.append(run.night(found))
    return run, found, decisions


def test_honest_candidates_go_live(story: Tuple[HonestRun, Found, List[Decision]]) -> None:
    run, _, decisions = story
    assert [decision.promoted for decision in decisions] == [True, True], [d.reason for d in decisions]
    assert run.releases.numbers() == [0, 1, 2]


@pytest.mark.parametrize("kind", PLANTS)
def test_bad_candidates_are_blocked(kind: str, story: Tuple[HonestRun, Found, List[Decision]]) -> None:
    run, found, _ = story
    judged = case(kind, run, 3, judge_planted(run, found, PLANTS[kind], seed=1))
    assert not judged.promoted, judged
    assert judged.reason and judged.check
    assert run.releases.numbers() == [0, 1, 2], "nothing is left of it"


def test_and_the_honest_one_beside_them_is_not(story: Tuple[HonestRun, Found, List[Decision]], tmp_path: Path) -> None:
    run, found, _ = story
    decision = run.night(found)
    assert decision.promoted, decision.reason
