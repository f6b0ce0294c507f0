"""When to sleep: every policy on its own, together, on boundaries only, and after a resume."""

from __future__ import annotations

import json
import math
from typing import Any, List, Optional, Tuple

import numpy as np
import pytest
import torch

from nl_model.clock import LevelClock
from pipelines.config.schema import Config, RunSection
from pipelines.config.when import WhenConfig
from pipelines.wake.trigger import Cause, Drift, Trigger, relative_distance

STEP, FAST, PERIOD = 10, 40, 400
CLOCK = LevelClock({"fast": FAST, "medium": 2 * FAST})


class Now:
    """A clock that is set by hand."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def trigger(now: Optional[Now] = None, **settings: Any) -> Trigger:
    return Trigger(WhenConfig(**settings), PERIOD, CLOCK, now or Now())


def walk(one: Trigger, losses: List[float], distance: float = 0.0, start: int = 0) -> List[Tuple[int, Cause]]:
    """Take a step per loss; returns (position, cause) of the rounds that were due."""
    found = []
    for number, loss in enumerate(losses):
        before = start + number * STEP
        cause = one.after_step(before, before + STEP, loss, lambda: distance)
        if cause is not None:
            found.append((before + STEP, cause))
    return found


def test_by_default_a_round_is_due_with_the_pool_period() -> None:
    found = walk(trigger(), [math.nan] * 125)
    assert [tokens for tokens, _ in found] == [400, 800, 1200]
    assert found[0][1] == Cause("tokens", "the pool's period of 400 tokens has passed", {"period": 400})


def shifted(seed: int, steps: int, at: int, by: float) -> List[float]:
    rng = np.random.default_rng(seed)
    return [float(3.0 + 0.2 * rng.standard_normal() + (by if step >= at else 0.0)) for step in range(steps)]


def test_a_shift_of_the_online_loss_is_found_soon_and_only_then() -> None:
    delays = []
    for seed in range(20):
        drift = Drift(0.5, 10.0, 32)
        alarms = [i for i, loss in enumerate(shifted(seed, 600, 400, 0.4)) if drift.observe(loss)]
        assert alarms and alarms[0] >= 400, f"seed {seed}: false alarm"
        delays.append(alarms[0] - 400)
    # A shift of 2 deviations gains 1.5 per step over the slack: threshold / 1.5 steps on average.
    assert np.median(delays) == pytest.approx(10.0 / 1.5, abs=2.0) and max(delays) < 20


def test_a_loss_that_falls_is_no_drift() -> None:
    drift = Drift(0.5, 10.0, 32)
    rng = np.random.default_rng(0)
    assert not any(drift.observe(5.0 * math.exp(-i / 200) + 0.1 * rng.standard_normal()) for i in range(1000))


def test_cusum_by_hand() -> None:
    drift = Drift(slack=0.5, threshold=3.0, warmup=2)
    for loss in (0.0, 2.0):  # mean 1, deviation sqrt(2)
        assert not drift.observe(loss)
    assert not drift.observe(1.0 + 2.5 * math.sqrt(2))
    assert drift.excess == pytest.approx(2.0)
    assert not drift.observe(math.nan) and drift.excess == pytest.approx(2.0), "a step without a loss changes nothing"
    deviation = math.sqrt(drift.squares / (drift.count - 1))
    assert drift.observe(drift.mean + 2.0 * deviation)
    assert (drift.count, drift.excess) == (0, 0.0), "it starts anew"


def test_surprise_waits_for_a_common_boundary_and_says_what_it_saw() -> None:
    found = walk(trigger(policies=["surprise"], drift_warmup=8), shifted(1, 60, 41, 3.0))
    (tokens, cause) = found[0]
    assert tokens == 480 and tokens % (2 * FAST) == 0
    assert cause.policy == "surprise" and cause.figures["loss"] > cause.figures["mean"] + 2.0
    assert "the online loss has risen from" in cause.text


def test_saturation_is_looked_at_on_boundaries_only() -> None:
    asked = []

    def distance() -> float:
        asked.append(None)
        return 0.25

    one = trigger(policies=["saturation"], saturation=0.2)
    causes = [one.after_step(t, t + STEP, 1.0, distance) for t in range(0, 160, STEP)]
    assert [i for i, cause in enumerate(causes) if cause is not None] == [7, 15] and len(asked) == 2
    assert causes[7] == Cause(
        "saturation", "the fast levels have moved by 0.250 of their rest's norm", {"distance": 0.25}
    )
    assert walk(trigger(policies=["saturation"], saturation=0.3), [1.0] * 40, distance=0.25) == []


def test_time_is_counted_from_the_last_round() -> None:
    now = Now()
    one = trigger(now, policies=["time"], seconds=100.0)
    assert walk(one, [1.0] * 8) == []
    now.seconds = 100.0
    assert walk(one, [1.0] * 3, start=80) == [], "no boundary yet"
    ((tokens, cause),) = walk(one, [1.0] * 20, start=110)
    assert tokens == 160 and cause.policy == "time"


def test_a_pause_of_the_stream_pins_a_round_before_the_next_step() -> None:
    one = trigger(policies=["idle"], idle_seconds=60.0)
    assert one.before_step(80, 59.0) is None
    cause = one.before_step(160, 61.0)
    assert cause is not None and cause.policy == "idle" and cause.figures == {"seconds": 61.0}
    assert one.before_step(170, 61.0) is None, "not on a boundary"
    assert walk(one, [1.0] * 10, start=170)[0][0] == 240, "but at the next one"


def test_rounds_keep_their_distance() -> None:
    one = trigger(policies=["saturation"], saturation=0.1, least=0.5)
    assert [tokens for tokens, _ in walk(one, [1.0] * 60, distance=1.0)] == [240, 480]


def test_any_policy_is_enough() -> None:
    one = trigger(policies=["tokens", "saturation"], saturation=0.1, least=0.5)
    found = [(tokens, cause.policy) for tokens, cause in walk(one, [1.0] * 60, distance=1.0)]
    assert found == [(240, "saturation"), (400, "tokens")]


@pytest.mark.parametrize("cut", [5, 30, 45, 50])
def test_a_resumed_trigger_decides_the_same(cut: int) -> None:
    settings: Any = {"policies": ["tokens", "surprise"], "drift_warmup": 8}
    losses = shifted(1, 100, 41, 3.0)
    whole = walk(trigger(**settings), losses)
    first, second = trigger(**settings), trigger(**settings)
    found = walk(first, losses[:cut])
    second.load_state(json.loads(json.dumps(first.state())))
    found += walk(second, losses[cut:], start=cut * STEP)
    assert found == whole and {cause.policy for _, cause in whole} == {"tokens", "surprise"}


def test_time_passed_survives_a_resume() -> None:
    now, later = Now(), Now()
    now.seconds, later.seconds = 70.0, 1000.0
    one = Trigger(WhenConfig(policies=["time"], seconds=100.0), PERIOD, CLOCK, Now())
    one.now = now
    two = trigger(later, policies=["time"], seconds=100.0)
    two.load_state(one.state())
    assert walk(two, [1.0] * 8) == []
    later.seconds += 30.0
    assert len(walk(two, [1.0] * 8, start=80)) == 1


def test_relative_distance() -> None:
    rest = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    moved = {"a": torch.tensor([3.0, 0.3]), "b": torch.tensor([4.4])}
    assert relative_distance(moved, rest) == pytest.approx(0.5 / 5.0)
    assert relative_distance(rest, rest) == 0.0


@pytest.mark.parametrize("policy", ["time", "idle"])
def test_deterministic_runs_do_not_go_by_the_clock(policy: str) -> None:
    when = WhenConfig(policies=["tokens", policy])
    assert Config(when=when).when is when
    with pytest.raises(ValueError, match=rf"when.policies has '{policy}'.*run.deterministic=true"):
        Config(when=when, run=RunSection(deterministic=True))
    with pytest.raises(ValueError, match=r"when.policies='moon' is unknown; use one of tokens, time"):
        WhenConfig(policies=["moon"])
