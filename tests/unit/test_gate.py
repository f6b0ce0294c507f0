"""The gate: what goes live, what does not, and that it says why."""

from __future__ import annotations

import json
import math

import pytest

from pipelines.gate import decide
from pipelines.gate_config import GateConfig

CFG = GateConfig(max_forgetting=0.25, max_regression=0.05)
ANCHOR = {"a": 2.0, "b": 3.0, "c": 4.0}
AWAKE = {"a": 2.5, "b": 2.5, "c": 4.0}
SEEN = ["a", "b"]


def test_a_candidate_within_both_budgets_is_promoted() -> None:
    decision = decide({"a": 2.125, "b": 2.5, "c": 9.0}, ANCHOR, AWAKE, SEEN, CFG)
    assert decision.promoted and decision.word == "promoted"
    assert decision.figures["worst"] == {"source": "a", "loss": pytest.approx(0.125)}
    assert decision.figures["mean_change"] == pytest.approx(-0.1875)
    assert decision.figures["seen"] == SEEN and decision.figures["anchor"] == ANCHOR
    assert decision.figures["awake"] == AWAKE and decision.figures["candidate"]["c"] == 9.0
    assert "a +0.125" in decision.reason
    json.dumps(decision.figures)


def test_a_candidate_equal_to_the_anchor_is_promoted() -> None:
    assert decide(ANCHOR, ANCHOR, AWAKE, SEEN, GateConfig(max_forgetting=0.0, max_regression=0.0)).promoted


def test_forgetting_one_source_is_not_bought_by_gains_elsewhere() -> None:
    decision = decide({"a": 2.5, "b": 1.0, "c": 4.0}, ANCHOR, AWAKE, SEEN, CFG)
    assert not decision.promoted and decision.word == "rejected"
    assert decision.reason == "forgets a by 0.500 bits per byte, more than gate.max_forgetting=0.25"
    assert decide({"a": 2.25, "b": 1.0, "c": 4.0}, ANCHOR, AWAKE, SEEN, CFG).promoted, "the budget itself is allowed"


def test_a_small_loss_everywhere_is_a_regression() -> None:
    decision = decide({"a": 2.125, "b": 3.125, "c": 4.0}, ANCHOR, AWAKE, SEEN, CFG)
    assert not decision.promoted
    assert "worse by 0.125 bits per byte on average, more than gate.max_regression=0.05" in decision.reason


def test_a_negative_budget_asks_for_progress() -> None:
    cfg = GateConfig(max_regression=-0.1)
    assert not decide({"a": 1.95, "b": 2.95}, ANCHOR, AWAKE, SEEN, cfg).promoted
    assert decide({"a": 1.75, "b": 2.75}, ANCHOR, AWAKE, SEEN, cfg).promoted


def test_sources_not_seen_yet_do_not_count() -> None:
    assert decide({"a": 2.0, "b": 3.0, "c": 99.0}, ANCHOR, AWAKE, SEEN, CFG).promoted
    assert not decide({"a": 2.0, "b": 3.0, "c": 99.0}, ANCHOR, AWAKE, [*SEEN, "c"], CFG).promoted


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", SEEN)
def test_a_candidate_that_is_not_finite_is_rejected(value: float, place: str) -> None:
    decision = decide({**{"a": 1.0, "b": 1.0, "c": 1.0}, place: value}, ANCHOR, AWAKE, SEEN, CFG)
    assert not decision.promoted
    assert decision.reason == f"loss on {place} is not finite"
    assert decision.figures["worst"]["source"] == place
