"""Samplers: functions of seed and step, with the distribution they promise and the caps they keep."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.experience import ExperienceStore, Recency, Record, Snapshot, Surprise, Uniform, build_sampler
from pipelines.experience.sampler import cap_shares, uniforms

CONTEXT = 3
SURPRISE = [1.0, 2.0, 0.5, 1e9, 3.0, 0.0, 1.0, 1.5]
SOURCES = ["a", "a", "b", "b", "a", "c", "c", "a"]


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    rows = zip(SURPRISE, SOURCES, strict=True)
    with ExperienceStore.open(tmp_path / "s", CONTEXT, "uint16") as store:
        tokens = np.zeros(CONTEXT + 1, np.uint16)
        store.append([Record(key=k, source=s, surprise=v, tokens=tokens) for k, (v, s) in enumerate(rows)])
        store.commit()
    return Snapshot.open(tmp_path / "s")


def chi_square(counts: np.ndarray, shares: np.ndarray) -> float:
    expected = shares * counts.sum()
    return float((((counts - expected) ** 2)[expected > 0] / expected[expected > 0]).sum())


@pytest.mark.parametrize("name", ["uniform", "recency", "surprise"])
def test_draws_follow_the_probabilities_they_report(snapshot: Snapshot, name: str) -> None:
    rows = np.arange(len(snapshot))
    sampler = build_sampler(name, snapshot, rows, half_life=3)
    drawn = [sampler.draw(50, seed=5, step=step) for step in range(400)]
    counts = np.bincount(np.concatenate([rows for rows, _ in drawn]), minlength=len(rows))
    shares = np.zeros(len(rows))
    for picked, probabilities in drawn:
        shares[picked] = probabilities
    assert shares.sum() == pytest.approx(1)
    assert (counts[shares == 0] == 0).all()
    assert chi_square(counts, shares) < 24.3  # 7 degrees of freedom, p = 0.001


def test_draw_is_a_function_of_seed_and_step(snapshot: Snapshot) -> None:
    rows = np.arange(len(snapshot))
    first, second = (build_sampler("surprise", snapshot, rows) for _ in range(2))
    assert first.draw(64, 3, 9)[0].tolist() == second.draw(64, 3, 9)[0].tolist()
    assert first.draw(8, 3, 9)[0].tolist() == second.draw(64, 3, 9)[0][:8].tolist()
    assert first.draw(64, 3, 9)[0].tolist() != first.draw(64, 3, 10)[0].tolist()
    assert first.draw(64, 3, 9)[0].tolist() != first.draw(64, 4, 9)[0].tolist()


PINNED = [0.8055965191839494, 0.9020428534599669, 0.1782128601556101]
"""A change of these changes every replay ever recorded."""


def test_numbers_of_different_steps_do_not_overlap_and_never_change() -> None:
    long, following = uniforms(1000, 0, 0), uniforms(1000, 0, 1)
    assert not set(long.tolist()) & set(following.tolist())
    assert (long >= 0).all() and (long < 1).all()
    assert uniforms(3, 7, 11).tolist() == pytest.approx(PINNED, abs=0)
    with pytest.raises(ValueError, match="at least 0"):
        uniforms(1, -1, 0)


def test_recency_halves_per_half_life(snapshot: Snapshot) -> None:
    sampler = Recency(snapshot, np.arange(8), half_life=2)
    assert sampler.shares[7] / sampler.shares[5] == pytest.approx(2)
    assert sampler.shares[7] / sampler.shares[1] == pytest.approx(8)


def test_surprise_keeps_its_caps(snapshot: Snapshot) -> None:
    rows = np.arange(8)
    free = Surprise(snapshot, rows, cap=2, source_cap=1)
    assert free.shares.max() == pytest.approx(2 / 8)  # although one row claims nearly all
    assert free.shares[1] / free.shares[0] == pytest.approx(2)
    capped = Surprise(snapshot, rows, cap=8, source_cap=0.4)
    totals = {name: capped.shares[[s == name for s in SOURCES]].sum() for name in "abc"}
    assert max(totals.values()) == pytest.approx(0.4) and sum(totals.values()) == pytest.approx(1)
    relaxed = Surprise(snapshot, rows[:2], cap=8, source_cap=0.1)
    assert relaxed.shares.sum() == pytest.approx(1)  # one source only: nothing to cap it against
    thirds = Surprise(snapshot, rows, cap=8, source_cap=0.1)
    assert [thirds.shares[[s == name for s in SOURCES]].sum() for name in "abc"] == pytest.approx([1 / 3] * 3)


@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=30),
    cap=st.floats(0, 1.5),
)
def test_capped_shares(weights: list[float], cap: float) -> None:
    values = np.array(weights)
    shares = cap_shares(values, cap)
    bound = max(cap, 1 / len(values))
    assert shares.sum() == pytest.approx(1)
    assert (shares >= 0).all() and (shares <= bound * (1 + 1e-9)).all()
    assert (np.diff(shares[np.argsort(values, kind="stable")]) >= -1e-12).all(), "more weight, no less share"
    if values.sum() and (values / values.sum()).max() <= bound:
        assert shares == pytest.approx(values / values.sum())


def test_quarantined_rows_weigh_nothing(tmp_path: Path) -> None:
    kinds = ["real", "quarantined", "real"]
    tokens = np.zeros(CONTEXT + 1, np.uint16)
    surprise = [1.0, float("nan"), 3.0]
    with ExperienceStore.open(tmp_path / "q", CONTEXT, "uint16") as store:
        store.append([Record(key=k, source="a", kind=kinds[k], surprise=surprise[k], tokens=tokens) for k in range(3)])
        store.commit()
    sampler = Surprise(Snapshot.open(tmp_path / "q"), np.arange(3), cap=3, source_cap=1)
    assert sampler.shares == pytest.approx([0.25, 0, 0.75])


def test_nothing_to_draw_from_and_bad_settings_are_refused(snapshot: Snapshot) -> None:
    with pytest.raises(ValueError, match="no rows to draw from"):
        Uniform(np.array([], np.int64))
    with pytest.raises(ValueError, match="sampler='best' is unknown"):
        build_sampler("best", snapshot, np.arange(3))
    with pytest.raises(ValueError, match="half_life=0"):
        Recency(snapshot, np.arange(3), 0)
    with pytest.raises(ValueError, match=r"cap=0\.5"):
        Surprise(snapshot, np.arange(3), 0.5, 1)
