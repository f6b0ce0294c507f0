"""Comparison: the memory's bound, who is visited when, statistics, names and settings. Seeds are fixed."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.compare.config import CIRCADIAN, METHODS, REGIMES, VARIANTS, Method, Night
from pipelines.compare.material import order_sources
from pipelines.compare.memory import TOP_BYTES, Memory
from pipelines.compare.names import lr_of, method_of, names
from pipelines.compare.options import Options
from pipelines.compare.plain import _fitting_top, _new_counts, _visits
from pipelines.compare.pulls import keep_top, top_divergence
from pipelines.compare.statistics import columns, gap_closed, interval, paired, slope
from pipelines.gate.probe import Row, read_matrix

REQUIRED = {"circadian", "naive", "joint", "replay_5", "replay_25", "replay_50", "replay_tuned", "der", "ewc", "lwf"}
REQUIRED |= {"ema", "mer", "lora", "one_frequency", "sleep_as_replay"}


def rows(number: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.arange(start, start + number)[:, None] * np.ones((1, 5), np.int64)
    return tokens, np.arange(start, start + number) % 3


def test_every_method_of_the_field_is_there() -> None:
    assert set(METHODS) >= REQUIRED
    nights = [method.night for name, method in METHODS.items() if name.startswith("circadian")]
    assert len(set(nights)) == len(nights), "every ablation changes something, and each something else"
    for name, variants in VARIANTS.items():
        assert METHODS[name] == next(iter(variants.values())), f"tuning of {name} must start from the method itself"


@given(st.integers(1, 40), st.lists(st.integers(0, 30), max_size=6), st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_the_memory_never_holds_more_than_its_bytes(limit: int, offers: list[int], extra: int) -> None:
    memory = Memory(limit * 4 * (1 + extra), extra, seed=1)
    start = 0
    for number in offers:
        memory.add(*rows(number, start))
        start += number
        assert len(memory) == min(limit, start)
        assert len(memory) * 4 * (1 + extra) <= memory.capacity
        assert set(memory.tokens_NS[:, 0].tolist() if len(memory) else []) <= set(range(start))


def test_every_sequence_stays_with_equal_chance() -> None:
    counts = np.zeros(40)
    for seed in range(600):
        memory = Memory(10 * 4, 0, seed)
        memory.add(*rows(25))
        memory.add(*rows(15, 25))
        counts[memory.tokens_NS[:, 0]] += 1
    # 600 draws of 10 out of 40: mean 150, standard deviation about 10.6.
    assert counts.sum() == 6000 and abs(counts - 150).max() < 5 * 10.6


def test_stored_log_probabilities_stay_beside_their_sequence() -> None:
    memory = Memory(12 * 4 * (1 + TOP_BYTES), TOP_BYTES, seed=3)
    tokens, sources = rows(50)
    kept = np.repeat(tokens[:, 1:, None], 1, axis=2)
    memory.add(tokens, sources, kept=(kept, kept.astype(np.float16)))
    assert memory.ids_NTK is not None and len(memory) == 12
    np.testing.assert_array_equal(memory.ids_NTK[:, :, 0], memory.tokens_NS[:, 1:])
    np.testing.assert_array_equal(memory.sources_N, memory.tokens_NS[:, 0] % 3)


def test_balance_draws_sources_equally() -> None:
    memory = Memory(float("inf"), 0, seed=0)
    memory.add(np.zeros((90, 5), np.int64), np.zeros(90, int))
    memory.add(np.zeros((10, 5), np.int64), np.ones(10, int))
    plain, even = (memory.sources_N[memory.draw(4000, balance)].mean() for balance in (0.0, 1.0))
    assert plain == pytest.approx(0.1, abs=0.03) and even == pytest.approx(0.5, abs=0.04)


@given(st.integers(1, 12), st.lists(st.integers(1, 9), min_size=1, max_size=30), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_what_was_drawn_the_fewest_times_comes_first(held: int, draws: list[int], balance: float) -> None:
    memory = Memory(float("inf"), 0, seed=2, fewest=True)
    memory.add(*rows(3 * held))
    drawn = np.concatenate([memory.draw(number, balance) for number in draws])
    for source in range(3):
        counts = np.bincount(drawn, minlength=len(memory))[memory.sources_N == source]
        assert counts.max() - counts.min() <= 1, "a source goes round once before it begins again"
    memory.add(*rows(3, 900), trained=[0])
    before = [memory.uses_N[:-3][memory.sources_N[:-3] == source].min() for source in range(3)]
    assert (memory.uses_N[-3:] - before).tolist() == [1, 0, 0], "a newcomer has no draws to make up for"


@given(st.integers(1, 60), st.floats(0, 0.95), st.integers(1, 30))
@settings(max_examples=80, deadline=None)
def test_replay_takes_its_share_and_new_text_is_read_in_order(steps: int, replay: float, total: int) -> None:
    counts = _new_counts(steps, 8, replay)
    assert abs((8 * steps - counts.sum()) - 8 * steps * replay) <= 1
    visits = _visits(5, 5 + total, counts)
    flat = [place for part in visits for place in part]
    assert [len(part) for part in visits] == counts.tolist()
    assert all(5 <= place < 5 + total for place in flat)
    first = list(dict.fromkeys(flat))
    assert first == sorted(first), "a pass reads the stretch in stream order"
    if len(flat) >= total:
        assert first == list(range(5, 5 + total)), "every sequence is visited before any is visited twice"


def test_kept_log_probabilities_bound_the_divergence_from_below() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 50), torch.randn(2, 3, 50)
    full = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)
    few, many = (top_divergence(student, *keep_top(teacher, k)) for k in (4, 40))
    assert (few <= full + 5e-3).all() and (many <= full + 5e-3).all()
    assert (few >= -5e-3).all() and float(many.mean()) > float(few.mean())
    assert float(top_divergence(teacher, *keep_top(teacher, 8)).abs().max()) < 5e-3


def test_intervals_cover_and_pairs_cancel_what_they_share() -> None:
    draw = np.random.default_rng(0)
    hits = sum(low <= 0 <= high for low, high in (interval(draw.normal(size=12).tolist()) for _ in range(200)))
    assert 165 <= hits <= 200  # a percentile bootstrap of 12 values covers a little less than 95 %
    common = draw.normal(size=6) * 10
    found = paired((common - 0.1).tolist(), common.tolist())
    assert found["mean"] == pytest.approx(-0.1) and found["high"] == pytest.approx(-0.1)
    assert gap_closed([3.0], [5.0], [2.5]) == pytest.approx(0.8)
    assert slope([1.0, 2.0, 3.0, 4.0])["slope"] == pytest.approx(1.0)


def test_stored_log_probabilities_shrink_with_the_store() -> None:
    # 8 sequences of 256 tokens: 8 log-probabilities beside each take 66 KiB, 1 takes 10 KiB.
    tops = [_fitting_top(METHODS["der"], capacity, 8 * 256) for capacity in (float("inf"), 70e3, 40e3, 20e3, 4e3)]
    assert tops == [8, 8, 4, 2, 1]


def test_orders_are_permutations_and_unknown_ones_are_named() -> None:
    sources = ["a", "b", "c", "d"]
    assert order_sources(sources, "A") == sources and order_sources(sources, "reverse") == sources[::-1]
    assert sorted(order_sources(sources, "random-1")) == sources
    with pytest.raises(ValueError, match=r"'B' is unknown; use A, reverse, or random-N"):
        order_sources(sources, "B")


def test_methods_are_named_singly_in_families_and_all_together() -> None:
    assert list(names("replay_*")) == [n for n in METHODS if n.startswith("replay_")]
    assert set(names("all")) == set(METHODS)
    with pytest.raises(ValueError, match="'replay' is unknown; use all, or some of circadian"):
        list(names("naive,replay"))


def test_a_name_may_change_settings_of_its_method() -> None:
    name = "circadian:bank=0.25:fewest=false:lr=2e-3"
    assert list(names(f"naive,{name}")) == ["naive", name] and lr_of(name) == 2e-3 and lr_of("circadian") is None
    assert method_of(name) == replace(CIRCADIAN, night=replace(CIRCADIAN.night, bank=0.25, fewest=False))
    assert method_of("circadian_nights:rounds=4").night == replace(METHODS["circadian_nights"].night, rounds=4)
    assert method_of("circadian:handover=0:rounds=4").night.rounds == 4, "not idle with what is changed beside it"
    winner = Method(replay=0.8, balance=0.5, joins=16)
    assert method_of("replay_tuned:merge=0.25", winner) == replace(winner, merge=0.25), "what tuning chose is changed"
    assert method_of("replay_50:replay=0.6:schedule=constant") == Method(replay=0.6, schedule="constant")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("circadia:bank=0.5", "'circadia' is unknown"),
        ("circadian:bank", "'bank' in 'circadian:bank' is no change; write KEY=VALUE"),
        ("circadian:replay=0.5", "'replay' is unknown; use lr, or one of wake, "),
        ("naive:night=1", "'night' is unknown"),
        ("circadian:fewest=yes", "fewest='yes' must be true or false"),
        ("circadian:rounds=1.5", "rounds='1.5' must be a whole number"),
        ("circadian:bank=much", "'much' in 'circadian:bank=much' is no number"),
        ("circadian:bank=nan", "is no finite number"),
        ("circadian:bank=2", "bank=2.0 must lie between 0 and 1"),
        ("circadian:lr=0", "sets lr to no positive number"),
        ("circadian:lr=1e-3:lr=2e-3", "sets 'lr' twice"),
        ("circadian_*:bank=0", "settings change one method, not a family"),
        ("all:lr=1e-3", "settings change one method, not a family"),
        ("circadian:teacher=0.3", "'circadian:teacher=0.3': handover=0.5 leaves no pass of sleep's own"),
        ("mer:reptile_every=0", "reptile_every=0 must be at least 1"),
        ("der:der_top=-3", "der_top=-3 must be at least 1"),
        ("circadian_nights:recent_end=7", "recent_end=7.0 must lie between 0 and 1"),
        ("circadian:rounds=4", "rounds has no effect with handover=0.5; leave it out, or change that too"),
        ("circadian_nights:lwf=0.3", "lwf has no effect with handover=0"),
        ("circadian:bank=0:deep_recent=0.3", "deep_recent has no effect with bank=0"),
        ("circadian:wake=none:wake_lr=1", "wake_lr has no effect with wake=none"),
        ("mer:der_top=4", "der_top has no effect with der=0"),
        ("naive:der=0.3", "der has no effect with replay=0"),
        ("joint:replay=0.5", "replay has no effect with all text learned at once"),
        ("sleep_as_replay:cycle=false", "cycle has no effect with online=true"),
        ("circadian_not_held:scarce=false", "scarce has no effect with merge and anchor and dream and lwf 0"),
    ],
)
def test_changes_that_cannot_be_are_named(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        list(names(name))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Options(seeds=(0, 1000)), "contain the tuning seed 1000"),
        (lambda: Options(regimes=("half",)), "--regimes='half' is unknown"),
        (lambda: Options(tuned_in="half"), "--tuned-in='half' is unknown"),
        (lambda: Options(methods=("naive:lr=1e-3", "joint"), seeds=(1000,)), "contain the tuning seed 1000"),
        (lambda: Options(grid=()), "--grid is empty"),
        (lambda: Options(methods=("one_frequency",), regimes=("sleep10",)), "which one_frequency spends awake"),
        (lambda: Method(replay=1.5), "replay=1.5 must lie between 0 and 1"),
        (lambda: Night(wake="some"), "wake='some' is unknown"),
        (lambda: Night(rounds=0), "rounds=0 must be at least 1"),
        (lambda: Method(joins=0), "joins=0 must be at least 1"),
        (lambda: Night(on_policy=0.5, handover=0.0), "on_policy needs a guide"),
        (lambda: Night(teacher=0.5), "handover=0.5 leaves no pass of sleep's own over new text, which teacher needs"),
        (lambda: Night(wake="all"), "which wake=all needs; set handover=0"),
    ],
)
def test_wrong_settings_are_named(build: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build()  # type: ignore[operator]


def test_regimes_are_shares_of_the_stream() -> None:
    assert [REGIMES[name].stored for name in ("whole", "cap5", "cap1")] == [float("inf"), 0.05, 0.01]
    # A tenth of the FLOPs asleep: a wake step of 0.45 is nine tenths of the total.
    assert REGIMES["sleep10"].epochs(2.0, 0.45) == pytest.approx(0.5)
    assert REGIMES["cap5"].epochs(2.0, 0.45) == 2.0


def test_a_matrix_without_a_base_has_no_forgetting_of_it() -> None:
    rows_ = [Row(0, 0, {"a": 8.0, "b": 8.0}), Row(1, 10, {"a": 3.0, "b": 7.0}), Row(2, 20, {"a": 4.0, "b": 3.0})]
    figures = read_matrix(rows_, {"a": 10, "b": 20}, ["a", "b"], 0)
    assert figures["forgetting"] == pytest.approx(1.0) and figures["learning"] == pytest.approx(3.0)


def test_a_figure_that_a_trial_lacks_is_no_column() -> None:
    trials = {"a": [{"x": 1.0}, {"x": 2.0}], "b": [{"x": 1.0}, {}], "c": [{"x": None}], "d": []}
    assert columns(trials, "x") == {"a": [1.0, 2.0]}
