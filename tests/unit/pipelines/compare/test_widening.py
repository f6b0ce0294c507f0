"""A grid that widens until its best value is inside."""

from __future__ import annotations

import math
from typing import Callable, Dict, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.compare.widening import Widening, widen

GRID = (1e-3, 2e-3, 4e-3)


def search(grid: Tuple[float, ...], loss: Callable[[float], float], most: int) -> Tuple[Widening, Dict[float, float]]:
    found: Dict[float, float] = {}
    while (state := widen(grid, found, most)).next is not None:
        assert state.next not in found, "nothing is tried twice"
        found[state.next] = loss(state.next)
    return state, found


def bowl(best: float) -> Callable[[float], float]:
    return lambda rate: abs(math.log2(rate / best))


def test_a_grid_with_the_best_inside_is_all_that_is_tried() -> None:
    state, found = search(GRID, bowl(2e-3), 9)
    assert state == Widening(None, 2e-3) and tuple(found) == GRID


@pytest.mark.parametrize(("best", "expected"), [(16e-3, [8e-3, 16e-3, 32e-3]), (0.25e-3, [0.5e-3, 0.25e-3, 0.125e-3])])
def test_it_widens_by_two_until_the_best_is_inside(best: float, expected: list[float]) -> None:
    state, found = search(GRID, bowl(best), 9)
    assert state == Widening(None, best) and list(found)[3:] == expected


@pytest.mark.parametrize(("best", "edge"), [(1.0, "highest"), (1e-6, "lowest")])
def test_an_edge_is_said(best: float, edge: str) -> None:
    state, found = search(GRID, bowl(best), 5)
    assert len(found) == 5 and state.edge == edge and state.next is None
    assert state.best == (max(found) if edge == "highest" else min(found))


def test_what_diverges_is_searched_downwards_and_never_the_best() -> None:
    state, found = search(GRID, lambda rate: math.nan if rate > 2e-4 else rate, 9)
    assert state.best is not None and state.best < 2e-4 and min(found) <= state.best
    assert search(GRID, lambda rate: math.inf, 5)[0] == Widening(None, None, "lowest")


def test_the_best_so_far_is_known_while_the_search_goes_on() -> None:
    assert widen(GRID, {}, 9) == Widening(1e-3, None)
    assert widen(GRID, {1e-3: 3.0}, 9) == Widening(2e-3, 1e-3)
    with pytest.raises(ValueError, match=r"grid=\[0\.0\] must hold step sizes above 0"):
        widen([0.0], {}, 3)


@given(
    st.lists(st.sampled_from([2.0**k for k in range(-12, 0)]), min_size=1, unique=True),
    st.floats(-14, 2),
    st.integers(1, 20),
)
def test_every_search_ends_and_says_what_it_found(grid: list[float], best: float, most: int) -> None:
    state, found = search(tuple(grid), bowl(2.0**best), most)
    assert len(found) <= max(most, len(grid))
    assert state.best == min(sorted(found), key=lambda rate: found[rate])
    inside = min(found) < state.best < max(found)
    assert inside != bool(state.edge), "either inside, or the edge is said"
