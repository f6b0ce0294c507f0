"""Controls: which trial comes next, what a control is configured as, and that it spends what the run spent."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Callable, Dict, List

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nl_model.model import NestedLM
from pipelines.compare.widening import widen
from pipelines.config.load import load_config
from pipelines.config.schema import Config, ControlConfig
from pipelines.data.module import open_data
from pipelines.machine.control import (
    Budget,
    Trial,
    at_once,
    control_config,
    final_mean,
    next_trial,
    place,
    run_control,
    search,
)

RATES = st.floats(1e-5, 1.0)


def ended(mean: float) -> Dict[str, Any]:
    """A trial that ended at a mean."""
    rows = [{"release": 0, "tokens": 0, "bpb": {"a": 9.0}}, {"release": 1, "tokens": 8, "bpb": {"a": mean}}]
    return {"rows": rows, "flops": 1.0}


def configured(rates: List[float], most: int, names: List[str]) -> Config:
    return replace(Config(), control=ControlConfig("true", names, rates, most))


@given(st.lists(RATES, min_size=1, max_size=4, unique=True), st.integers(0, 4), st.floats(1e-7, 1e3))
def test_a_grid_widens_until_the_best_is_inside_or_enough_was_tried(
    grid: List[float], more: int, optimum: float
) -> None:
    found: Dict[float, float] = {}
    most = len(grid) + more
    while (state := widen(grid, found, most)).next is not None:
        assert state.next not in found
        found[state.next] = abs(math.log(state.next / optimum))
    assert set(grid) <= set(found) and len(found) <= most
    assert state.best == min(sorted(found), key=lambda rate: found[rate])
    inside = min(found) < state.best < max(found)
    assert inside is (state.edge == "") and (inside or len(found) == most)


@given(st.dictionaries(RATES, st.one_of(st.just(math.nan), st.just(math.inf)), min_size=2, max_size=4))
def test_what_diverges_everywhere_is_searched_downwards(found: Dict[float, float]) -> None:
    state = widen(sorted(found), found, 9)
    assert state.next == min(found) / 2 and state.best is None


@settings(deadline=None)
@given(st.data())
def test_every_order_of_results_tries_the_same_trials(data: st.DataObject) -> None:
    """However many run at once and whichever ends first: none twice, none too many, all that one at a time tries."""
    names, rates = ["replay", "naive"], data.draw(st.lists(RATES, min_size=1, max_size=3, unique=True))
    cfg = configured(rates, data.draw(st.integers(len(rates), 5)), names)
    optimum = {name: data.draw(st.floats(1e-5, 1.0)) for name in names}

    def go(slots: int) -> Dict[str, Any]:
        control: Dict[str, Any] = {}
        running: List[Trial] = []
        while True:
            while len(running) < slots and (trial := next_trial(cfg, control, running)) is not None:
                assert trial not in running and trial.name not in control
                running.append(trial)
            if not running:
                return control
            one = running.pop(data.draw(st.integers(0, len(running) - 1)))
            control[one.name] = ended(abs(math.log(one.learning_rate / optimum[one.strategy])))

    alone, together = go(1), go(data.draw(st.integers(2, 4)))
    assert alone == together
    for name in names:
        tried = [trial for trial in map(Trial.of, alone) if trial.strategy == name]
        assert len(rates) <= len(tried) <= cfg.control.most
        edge = search(cfg, name, alone).edge
        assert not edge or len(tried) == cfg.control.most


def test_strategies_take_turns_and_what_has_ended_is_not_tried_again() -> None:
    cfg = configured([0.1, 0.2], 3, ["replay", "naive"])
    order: List[Trial] = []
    for _ in range(4):
        trial = next_trial(cfg, {}, order)
        assert trial is not None
        order.append(trial)
    assert [trial.name for trial in order] == ["replay@0.1", "naive@0.1", "replay@0.2", "naive@0.2"]
    assert next_trial(cfg, {}, order) is None, "what lies beyond the grid waits for results"
    control = {"replay@0.1": ended(3.0), "replay@0.2": ended(2.0)}
    assert next_trial(cfg, control, [Trial("naive", 0.1), Trial("naive", 0.2)]) == Trial("replay", 0.4)


@given(RATES)
def test_a_name_gives_its_trial_back(rate: float) -> None:
    assert Trial.of(Trial("no_dreams", rate).name) == Trial("no_dreams", rate)


def test_there_are_no_more_places_than_trials() -> None:
    assert at_once(load_config("default", ["control.enabled=false"])) == 0
    assert at_once(load_config("default")) == 2 and at_once(load_config("default", ["pool.ranks=4"])) == 4
    assert at_once(load_config("smoke", ["control.strategies=[naive]"])) == 1


def test_a_trial_that_diverged_is_worse_than_any_other() -> None:
    assert final_mean(ended(math.nan)["rows"]) == final_mean(ended(math.inf)["rows"]) == math.inf


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])  # a write of which costs as much as tokens do
@pytest.mark.parametrize("epochs", [0.8, 1.13, 2.0, 3.7])
@pytest.mark.parametrize("strategy", ["replay", "naive"])
def test_a_control_spends_what_the_run_spent_from_the_runs_base(
    strategy: str,
    epochs: float,
    optimizer: str,
    make_config: Callable[..., Config],
    make_model: Callable[..., NestedLM],
) -> None:
    cfg = make_config()
    cfg = replace(cfg, sleep=replace(cfg.sleep, optimizer=replace(cfg.sleep.optimizer, name=optimizer)))
    setting = open_data(cfg)
    stream, sequences = setting.stream(), 0
    while batch := stream.next_batch(4):
        sequences += len(batch)
    tokens = sequences * 16
    model = make_model(cfg.levels)
    full = 6.0 * sum(p.numel() for p in model.parameters())
    budget = Budget(epochs * full, tokens)
    found = control_config(cfg, Trial(strategy, 0.01), budget, setting)
    assert (found.strategy, found.wake.writes, found.sleep.optimizer.lr) == (strategy, "all", 0.01)
    assert not (found.trains_controls or found.wake.recall or found.dreams.share or found.report.look_every)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    shown: List[int] = []
    rows, flops = run_control(found, replace(setting, cfg=found), base, lambda rows: shown.append(len(rows)))
    assert flops == pytest.approx(budget.flops_per_token * tokens, rel=1e-9)
    assert (
        rows[0]["tokens"] == 0 and rows[-1]["tokens"] == tokens and sorted(set(shown)) == list(range(1, len(rows) + 1))
    )
    assert all(set(row["bpb"]) == {"a", "b", "c"} for row in rows)
    assert rows[-1]["bpb"]["c"] < rows[0]["bpb"]["c"] - 0.3, "it learns"
    assert all(torch.equal(base[name], p) for name, p in model.named_parameters()), "the base is left as it was"


def test_controls_are_equal_whatever_ran_before(
    make_config: Callable[..., Config], make_model: Callable[..., NestedLM]
) -> None:
    cfg = make_config()
    setting, seen = open_data(cfg), set[float]()
    found = control_config(cfg, Trial("replay", 0.01), Budget(1e5, 3200), setting)
    base = {name: p.detach().clone() for name, p in make_model(cfg.levels).named_parameters()}
    for _ in range(2):
        torch.rand(3)
        seen.add(final_mean(run_control(found, replace(setting, cfg=found), base, lambda rows: None)[0]))
    assert len(seen) == 1


def test_a_trial_says_which_of_how_many_it_is() -> None:
    cfg = configured([0.1, 0.2], 5, ["replay", "naive"])
    first, second, beyond = Trial("replay", 0.1), Trial("naive", 0.1), Trial("replay", 0.4)
    assert place(cfg, {}, (), first) == (1, 4)
    assert place(cfg, {first.name: {}}, (Trial("replay", 0.2),), second) == (3, 4)
    done: Dict[str, Dict[str, Any]] = {trial.name: {} for trial in (first, Trial("replay", 0.2), second)}
    assert place(cfg, done, (Trial("naive", 0.2),), beyond) == (5, 5), "it widened"
