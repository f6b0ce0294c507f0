"""Filters of dreams: copies, repetition, noise and odd perplexity are caught, ordinary text passes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import List

import numpy as np
import pytest

from pipelines.config.dreams import DreamConfig
from pipelines.dreams.filters import Band, Bands, copied_shares, density, judge, ngram_hashes, variety
from pipelines.experience import ExperienceStore, Record, Snapshot

N, CONTEXT, LAST = 64, 64, 29
CFG = DreamConfig(ngram=8, max_copied=0.25, copy_rows=10)
WORDS = ["night", "morning", "harbour", "of", "the", "slow", "river", "and", "a", "lantern", "burns", "quietly"]


def text(seed: int, size: int = N) -> np.ndarray:
    """Seeded words as bytes."""
    words = np.random.default_rng(seed).choice(WORDS, size)
    return np.frombuffer(" ".join(words).encode()[:size], np.uint8).astype(np.int64)


@pytest.fixture(scope="module")
def bands() -> Bands:
    return Bands.of(np.stack([text(seed) for seed in range(24)]), np.linspace(1.0, 2.0, 24), 0.25)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    path = tmp_path_factory.mktemp("filters") / "store"
    noise = np.random.default_rng(5).integers(0, 257, (30, CONTEXT + 1))
    with ExperienceStore.open(path, CONTEXT, "uint16") as store:
        store.append([Record(key=key, source="s", tokens=noise[key]) for key in range(30)])
        store.commit()
    return Snapshot.open(path)


def stored(snapshot: Snapshot, key: int) -> np.ndarray:
    return snapshot.tokens(snapshot.rows_between(key, key))[0].astype(np.int64)


def test_ordinary_text_passes(bands: Bands) -> None:
    verdicts: List[str | None] = [judge(text(seed), 1.5, 0.0, bands, CFG) for seed in range(100, 140)]
    assert verdicts.count(None) >= 38


@pytest.mark.parametrize(
    ("tokens", "loss", "copied", "reason"),
    [
        (text(7), math.nan, 0.0, "not finite"),
        (text(7), math.inf, 0.0, "not finite"),
        (np.full(N, 97), 1.5, 0.0, "repetitive"),
        (np.tile(text(7)[:8], 8), 1.5, 0.0, "repetitive"),
        (np.random.default_rng(0).integers(0, 257, N), 1.5, 0.0, "noise"),
        (text(7), 0.5, 0.0, "perplexity"),
        (text(7), 2.5, 0.0, "perplexity"),
        (text(7), 1.5, 0.3, "copied"),
    ],
)
def test_each_filter_catches_its_kind(
    bands: Bands, tokens: np.ndarray, loss: float, copied: float, reason: str
) -> None:
    assert judge(tokens, loss, copied, bands, CFG) == reason


def test_figures_of_repetition() -> None:
    assert variety(np.arange(20)) == 1.0 and variety(np.zeros(20, int)) == pytest.approx(1 / 17)
    assert density(np.zeros(400, int)) < 0.05 < density(np.random.default_rng(0).integers(0, 257, 400))
    assert 1.0 in Band.of([1.0, 2.0], 0.0) and 0.7 not in Band.of([1.0, 2.0], 0.25) and 0.8 in Band.of([1.0, 2.0], 0.25)


def shares(snapshot: Snapshot, texts: List[np.ndarray], parents: int = 1, cfg: DreamConfig = CFG) -> List[float]:
    return copied_shares(snapshot, texts, [(parents,)] * len(texts), LAST, cfg).tolist()


def test_a_copied_text_is_found_wherever_it_lies(snapshot: Snapshot) -> None:
    fresh = np.random.default_rng(6).integers(0, 257, 40)
    whole, shifted = stored(snapshot, 25)[:40], stored(snapshot, 28)[13:53]
    half = np.concatenate([stored(snapshot, 26)[3:23], np.random.default_rng(7).integers(0, 257, 20)])
    found = shares(snapshot, [fresh, whole, shifted, half])
    assert found[0] == 0.0 and found[1] == 1.0 and found[2] == 1.0
    assert found[3] == pytest.approx(13 / 33), "13 of 33 n-grams of eight tokens lie in the copied half"


def test_old_text_is_compared_with_where_it_is_a_parent_or_all_is_asked_for(snapshot: Snapshot) -> None:
    copy = stored(snapshot, 2)[10:50]
    assert shares(snapshot, [copy], parents=25) == [0.0], "beyond copy_rows"
    assert shares(snapshot, [copy], parents=2) == [1.0]
    assert shares(snapshot, [copy], parents=25, cfg=replace(CFG, copy_rows=0)) == [1.0]


def test_text_behind_the_round_is_not_looked_at(snapshot: Snapshot) -> None:
    copy = stored(snapshot, 25)[:40]
    assert copied_shares(snapshot, [copy], [(1,)], 24, CFG).tolist() == [0.0]


def test_a_dream_that_repeats_an_earlier_one_is_a_copy(snapshot: Snapshot) -> None:
    fresh = np.random.default_rng(8).integers(0, 257, 40)
    assert shares(snapshot, [fresh, fresh]) == [0.0, 1.0]


def test_changing_one_token_in_eight_leaves_no_long_ngram(snapshot: Snapshot) -> None:
    copy = stored(snapshot, 25)[:40].copy()
    copy[::8] = (copy[::8] + 1) % 257
    assert shares(snapshot, [copy]) == [0.0]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 8, 16, 23])
def test_hashes_are_equal_where_ngrams_are(n: int) -> None:
    tokens = np.random.default_rng(n).integers(0, 3, (6, 40))
    hashes = ngram_hashes(tokens, n)
    grams = np.lib.stride_tricks.sliding_window_view(tokens, n, axis=1).reshape(-1, n)
    _, codes = np.unique(grams, axis=0, return_inverse=True)
    pairs = set(zip(codes.ravel().tolist(), hashes.ravel().tolist(), strict=True))
    assert hashes.shape == (6, 40 - n + 1) and hashes.dtype == np.uint64
    assert len(pairs) == len({code for code, _ in pairs}) == len({found for _, found in pairs})


def test_a_store_may_be_empty_of_what_is_long_enough(tmp_path: Path) -> None:
    with ExperienceStore.open(tmp_path / "store", 4, "uint16") as store:
        store.append([Record(key=0, source="s", tokens=np.arange(5))])
        store.commit()
    found = copied_shares(Snapshot.open(tmp_path / "store"), [np.arange(9)], [(0,)], 0, CFG)
    assert found.tolist() == [0.0]
