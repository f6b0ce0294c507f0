"""The gate's benchmark: what its page says of the cases, and the runs it draws."""

from __future__ import annotations

import itertools

from benchmarks.gate import Case, blocked, render, small_config
from benchmarks.planted import PLANTS


def make_case(kind: str, check: str = "") -> Case:
    """One whose check failed, or that went live."""
    return Case(kind, 0, "cpp fonts", 1, not check, check, "why", 0.0, 0.0)


def test_the_page_counts_both_sides() -> None:
    cases = [make_case("honest"), make_case("honest", "loss"), make_case("NaN", "finite"), make_case("noise")]
    assert blocked(cases) == (1, 2, 1, 2)
    page = render(cases)
    assert "Planted bad candidates blocked: 1 of 2. Honest candidates blocked: 1 of 2." in page
    assert "| honest | 2 | 1 | loss 1, none 1 |" in page
    assert "| NaN | 1 | 1 | finite 1 |" in page and "| noise | 1 | 0 | none 1 |" in page


def test_every_run_has_a_seed_and_an_order_of_sources_of_its_own() -> None:
    configs = [small_config(seed) for seed in range(3)]
    assert [cfg.run.seed for cfg in configs] == [0, 1, 2]
    assert all(one.stream.sources != other.stream.sources for one, other in itertools.combinations(configs, 2))
    steps = {cfg.base.tokens // (cfg.base.batch * cfg.model.context) for cfg in configs}
    assert steps == {800} and len(PLANTS) == 23
