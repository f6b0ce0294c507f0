"""The clock: which levels are due is a function of positions alone, however the stream is cut into calls."""

from __future__ import annotations

from typing import Callable, Dict, List

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nl_model.clock import LevelClock, written_share
from nl_model.config import LevelConfig

NAMES = ["p", "q", "r", "s"]


@st.composite
def clocks(draw: st.DrawFn) -> LevelClock:
    factors = draw(st.lists(st.integers(1, 5), min_size=1, max_size=len(NAMES)))
    periods: Dict[str, int] = {}
    period = 1
    for name, factor in zip(NAMES, factors, strict=False):
        period *= factor
        periods[name] = period
    return LevelClock(periods)


@given(clock=clocks(), start=st.integers(0, 200), calls=st.lists(st.integers(0, 40), max_size=12))
def test_any_split_gives_the_boundaries_of_one_call_per_token(clock: LevelClock, start: int, calls: List[int]) -> None:
    position, seen = start, set()
    for tokens in calls:
        after = position + tokens
        by_token = {name for t in range(position, after) for name in clock.due(t, t + 1)}
        due = clock.due(position, after)
        assert set(due) == by_token
        assert list(due) == [name for name in NAMES if name in by_token], "fastest first, each once"
        seen |= by_token
        position = after
    assert set(clock.due(start, position)) == seen


def test_due_exactly_at_positive_multiples() -> None:
    clock = LevelClock({"fast": 1, "medium": 4, "slow": 12})
    for t in range(1, 49):
        assert clock.due(t - 1, t) == tuple(name for name, period in clock.periods.items() if t % period == 0)
    assert clock.due(0, 0) == ()


def test_on_boundary_wants_every_level() -> None:
    clock = LevelClock({"fast": 4, "medium": 12})
    assert [t for t in range(25) if clock.on_boundary(t)] == [0, 12, 24]


def test_of_keeps_one_owner_fastest_first(make_levels: Callable[..., Dict[str, LevelConfig]]) -> None:
    levels = dict(reversed(make_levels().items()))
    assert list(LevelClock.of(levels).periods.items()) == [("fast", 64), ("medium", 128), ("slow", 512)]
    assert list(LevelClock.of(levels, "learner").periods) == ["fast", "medium"]
    assert list(LevelClock.of(levels, "pool").periods) == ["slow"]


def test_the_clock_does_not_run_backwards() -> None:
    with pytest.raises(AssertionError, match="runs forward"):
        LevelClock({"fast": 2}).due(4, 3)


def test_written_share() -> None:
    """Check 12 of nested learning's list of executable checks: (sum of P / C) / (sum of P)."""
    assert written_share({"fast": 10, "slow": 30}, {"fast": 2, "slow": 10}) == pytest.approx((5 + 3) / 40)
    assert written_share({"one": 7}, {"one": 1}) == 1.0
