"""The gate on real candidates: every kind of planted bad one is blocked, honest ones go live."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, List, Tuple

import pytest

from benchmarks.gate import PLANTS, case, judge_planted
from benchmarks.small_run import Candidate, SmallRun
from nl_model.config import ModelConfig
from pipelines.config.schema import BaseConfig, Config, SleepConfig
from pipelines.gate.decision import Decision


@pytest.fixture(scope="module")
def story(
    make_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory
) -> Tuple[SmallRun, Candidate, List[Decision]]:
    """A run with two honest nights behind it, and the candidate of the third."""
    cfg = make_config(
        model=ModelConfig(dim=16, blocks=2, heads=2, context=16),
        base=BaseConfig(sources=["a"], tokens=16 * 16 * 150, batch=16, lr=1e-2),
        sleep=SleepConfig(batch=8, tokens_per_token=8.0),
    )
    run, decisions = SmallRun(cfg, tmp_path_factory.mktemp("small")), []
    while run.wake():
        candidate = run.sleep()
        if len(decisions) == 2:
            break
        decisions.append(run.night(candidate))
    return run, candidate, decisions


def test_honest_candidates_go_live(story: Tuple[SmallRun, Candidate, List[Decision]]) -> None:
    run, _, decisions = story
    assert [decision.promoted for decision in decisions] == [True, True], [d.reason for d in decisions]
    assert run.releases.numbers() == [0, 1, 2]


@pytest.mark.parametrize("kind", PLANTS)
def test_bad_candidates_are_blocked(kind: str, story: Tuple[SmallRun, Candidate, List[Decision]]) -> None:
    run, candidate, _ = story
    found = case(kind, run, 3, judge_planted(run, candidate, PLANTS[kind], seed=1))
    assert not found.promoted, found
    assert found.reason and found.check
    assert run.releases.numbers() == [0, 1, 2], "nothing is left of it"


def test_and_the_honest_one_beside_them_is_not(
    story: Tuple[SmallRun, Candidate, List[Decision]], tmp_path: Path
) -> None:
    run, candidate, _ = story
    decision = run.night(candidate)
    assert decision.promoted, decision.reason
