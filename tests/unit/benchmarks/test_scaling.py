"""The model of scaling: collectives as rings, a split that the pool keeps up with, links that measurements tell of."""

from __future__ import annotations

from dataclasses import replace
from typing import List, Tuple

import pytest

from benchmarks.scaling import (
    Cadence,
    Calls,
    Costs,
    Link,
    balanced,
    curve,
    data_parallel_rate,
    fit_link,
    learner_rate,
    round_seconds,
    simulate,
    sleep_step,
)

FREE = Link(0.0, 0.0)
SLOW = Link(1e-4, 1e-9)
COSTS = Costs(wake=1e-4, full=2e-4, sleep=3e-4, weights=8e6, fast=2e6, release=1e7, adoption=0.0, link=FREE)
CADENCE = Cadence(wake_tokens=1000, fast_period=2000, slow_period=100_000, sleep_tokens=1000, ratio=0.5)


@pytest.mark.parametrize("ranks", [2, 3, 16])
def test_a_link_is_found_again_in_what_it_takes(ranks: int) -> None:
    points: List[Tuple[float, float]] = [(size, SLOW.all_reduce(size, ranks)) for size in (1e3, 1e5, 1e7)]
    found = fit_link(points, ranks)
    assert found.alpha == pytest.approx(SLOW.alpha) and found.beta == pytest.approx(SLOW.beta)


def test_a_link_never_pays_back() -> None:
    assert fit_link([(1e3, 2.0), (1e6, 1.0)], 2) == Link(1.0, 0.0)
    with pytest.raises(ValueError, match="two ranks and two sizes"):
        fit_link([(1e3, 1.0), (1e6, 1.0)], 1)
    with pytest.raises(ValueError, match="two ranks and two sizes"):
        fit_link([(1e3, 1.0), (1e3, 1.1)], 2)


def test_one_rank_talks_to_nobody() -> None:
    assert SLOW.all_reduce(1e9, 1) == SLOW.pass_around(1e9, 1) == SLOW.broadcast(1e9, 1) == 0


def test_a_ring_moves_nearly_twice_the_bytes_however_many_ranks() -> None:
    wide = Link(0.0, 1e-9)
    assert wide.all_reduce(1e9, 2) == pytest.approx(1.0)
    assert wide.all_reduce(1e9, 1000) == pytest.approx(2.0, rel=2e-3)
    assert sleep_step(replace(COSTS, link=wide, weights=1e9, parts=3.0), 1000, 0) == pytest.approx(3.0, rel=2e-3)


def test_every_collective_costs_its_messages() -> None:
    slow = replace(COSTS, link=Link(1.0, 0.0), calls=Calls(rings=5.0, trees=2.0))
    assert sleep_step(slow, 2, 0) == 5.0 + 2.0
    assert sleep_step(slow, 16, 0) == 15 * 5.0 + 4 * 2.0, "rings have a message per neighbour, trees one per height"
    assert sleep_step(slow, 1, 0) == 0.0


def test_without_costs_of_communication_everything_scales_with_ranks() -> None:
    assert learner_rate(COSTS, CADENCE, 1) == pytest.approx(1 / COSTS.wake)
    assert learner_rate(COSTS, CADENCE, 50) == pytest.approx(50 * learner_rate(COSTS, CADENCE, 1))
    assert round_seconds(COSTS, CADENCE, 1) == pytest.approx(COSTS.sleep * CADENCE.ratio * CADENCE.slow_period)
    assert round_seconds(COSTS, CADENCE, 10) == pytest.approx(round_seconds(COSTS, CADENCE, 1) / 10)
    assert data_parallel_rate(COSTS, CADENCE, 10) == pytest.approx(10 / (COSTS.full * 1.5))


def test_nodes_are_split_as_the_work_is() -> None:
    """One token streamed takes 1e-4 s awake and nearly half of 3e-4 s asleep: three nodes of five sleep."""
    cadence, costs = replace(CADENCE, slow_period=600_000, fast_period=20_000), replace(COSTS, sleep=2.99e-4)
    found = balanced(costs, cadence, 10)
    assert (found.pool, found.keeps_up) == (6, True)
    assert not simulate(costs, cadence, 10, 5).keeps_up
    assert found.sustained == found.stream == pytest.approx(4 / COSTS.wake)


def test_what_is_not_slept_on_does_not_count() -> None:
    found = simulate(replace(COSTS, sleep=6e-4), CADENCE, 2, 1)
    assert not found.keeps_up and found.round_seconds == pytest.approx(3 * found.period_seconds)
    assert found.sustained == pytest.approx(found.stream / 3)


def test_a_pool_that_cannot_keep_up_lags_as_little_as_it_can() -> None:
    found = balanced(replace(COSTS, sleep=1.0), CADENCE, 4)
    assert (found.pool, found.keeps_up) == (3, False)


def test_rare_meetings_outlast_a_slow_link() -> None:
    """What data-parallel training pays at every step, the learner pays for its fast levels and once per round."""
    points = curve(replace(COSTS, link=SLOW), CADENCE)
    assert [point.nodes for point in points] == [2, 10, 100, 1000]
    kept = [p.sustained / p.nodes / (points[0].sustained / points[0].nodes) for p in points]
    first = points[0]
    theirs = [p.data_parallel / p.nodes / (first.data_parallel / first.nodes) for p in points]
    assert all(ours > other for ours, other in zip(kept[1:], theirs[1:], strict=True))


@pytest.mark.parametrize("pool", [0, 4, 5])
def test_both_need_a_node(pool: int) -> None:
    with pytest.raises(ValueError, match="leaves no node"):
        simulate(COSTS, CADENCE, 4, pool)
