"""Controls in summary.json: the best trial of each strategy, the edge of what was tried, and the stronger of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Dict

import pytest

from cluster.driver.summary import stronger, summarise_controls
from pipelines.config.schema import Config, ControlConfig
from pipelines.machine.state import RunState

SOURCES = ["base", "new"]


def trial(new: float, flops: float = 5.0) -> Dict[str, Any]:
    rows = [
        {"release": 0, "tokens": 0, "bpb": {"base": 2.0, "new": 6.0}},
        {"release": 1, "tokens": 100, "bpb": {"base": 2.5, "new": new}},
    ]
    return {"rows": rows, "flops": flops}


def summarised(control: Dict[str, Any], *names: str) -> Dict[str, Dict[str, Any]]:
    cfg = replace(Config(), control=ControlConfig(strategies=list(names or ("replay", "naive"))))
    return summarise_controls(cfg, RunState(control=control, ends={"new": 100}), SOURCES, 1)


def test_the_best_step_size_of_each_strategy_counts() -> None:
    control = {"naive@0.1": trial(5.0), "replay@0.4": trial(4.5), "replay@0.1": trial(4.0), "replay@0.2": trial(3.5, 7)}
    found = summarised(control)
    assert list(found) == ["replay", "naive"], "as configured, not as they ended"
    replay = found["replay"]
    assert (replay["learning_rate"], replay["edge"], replay["flops"]) == (0.2, False, 7)
    assert replay["matrix"] == [[2.0, 6.0], [2.5, 3.5]] and replay["mean_final_bpb"] == pytest.approx(3.0)
    assert [tried["learning_rate"] for tried in replay["tried"]] == [0.1, 0.2, 0.4]
    assert [tried["mean_final_bpb"] for tried in replay["tried"]] == pytest.approx([3.25, 3.0, 3.5])
    assert stronger(found) == {"strategy": "replay", **replay}


@pytest.mark.parametrize(("best", "edge"), [(0.1, True), (0.2, False), (0.4, True)])
def test_an_edge_is_said(best: float, edge: bool) -> None:
    control = {f"naive@{rate}": trial(4.0 + abs(rate - best)) for rate in (0.1, 0.2, 0.4)}
    found = summarised(control)["naive"]
    assert (found["learning_rate"], found["edge"]) == (best, edge)


def test_what_diverged_is_never_the_best() -> None:
    found = summarised({"replay@0.1": trial(math.nan), "replay@0.2": trial(5.0), "naive@0.1": trial(math.nan)})
    assert found["replay"]["learning_rate"] == 0.2 and found["naive"]["edge"]
    only = stronger({"naive": found["naive"], "replay": found["replay"]})
    assert only is not None and only["strategy"] == "replay"


def test_without_controls_there_is_none() -> None:
    assert summarised({}) == {} and stronger({}) is None


def test_a_strategy_that_is_not_configured_any_more_is_still_told_of() -> None:
    assert list(summarised({"reading@0.1": trial(3.0), "naive@0.1": trial(3.0)}, "naive")) == ["naive", "reading"]
