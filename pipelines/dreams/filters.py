"""What sorts dreams out: text that is not finite, degenerate, unlike real text for the model, or copied from the store.

Shapes: B sequences, N tokens behind the prompt, R stored rows, S stored tokens.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional, Tuple

import numpy as np

from pipelines.config.dreams import DreamConfig
from pipelines.experience.replay import Experience

_DISTINCT = 4
"""Length of the n-grams whose variety is looked at."""
_CHUNK = 1024
"""Stored rows compared at a time."""
_TABLE = 1 << 20
_BASE = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Band:
    """An interval that real text spans."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray, margin: float) -> Band:
        """From the least to the largest value, wider by `margin` times that width on either side."""
        low, high = float(np.min(values)), float(np.max(values))
        return cls(low - margin * (high - low), high + margin * (high - low))

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Bands:
    """Where real text of the same length lies."""

    variety: Band
    """Distinct n-grams per n-gram."""
    density: Band
    """Compressed bytes per byte."""
    loss: Band
    """Mean loss, nats per token: the logarithm of perplexity. The awake model's on a dream, surprise of real text."""

    @classmethod
    def of(cls, texts_BN: np.ndarray, losses_B: np.ndarray, margin: float) -> Bands:
        """From real texts, (B, N), and mean losses on them, (B,)."""
        return cls(
            Band.of([variety(text) for text in texts_BN], margin),
            Band.of([density(text) for text in texts_BN], margin),
            Band.of(losses_B, margin),
        )


def judge(tokens_N: np.ndarray, loss: float, copied: float, bands: Bands, cfg: DreamConfig) -> Optional[str]:
    """Why a dream is refused; None if it is not. `tokens_N`: what follows its prompt."""
    if not math.isfinite(loss):
        return "not finite"
    various, dense = variety(tokens_N), density(tokens_N)
    if various < bands.variety.low or dense < bands.density.low:
        return "repetitive"
    if various > bands.variety.high or dense > bands.density.high:
        return "noise"
    if loss not in bands.loss:
        return "perplexity"
    return "copied" if copied > cfg.max_copied else None


def variety(tokens_N: np.ndarray) -> float:
    """Distinct n-grams per n-gram (of four tokens): 1 where none comes twice."""
    grams = np.lib.stride_tricks.sliding_window_view(tokens_N, min(_DISTINCT, len(tokens_N)))
    return len(np.unique(grams, axis=0)) / len(grams)


def density(tokens_N: np.ndarray) -> float:
    """Compressed bytes per byte of the tokens (zlib): small for what repeats itself."""
    data = np.asarray(tokens_N, np.uint32).tobytes()
    return len(zlib.compress(data)) / len(data)


def ngram_hashes(tokens_RS: np.ndarray, n: int) -> np.ndarray:
    """64-bit hash of each n-gram of each row, uint64 (R, S - n + 1): a polynomial modulo 2^64, then mixed.

    Built by doubling, hash(uv) = hash(u) M^|v| + hash(v), in about 2 log2(n) passes.
    """
    power, size = tokens_RS.astype(np.uint64) + np.uint64(1), 1  # hashes of n-grams of length `size`, a power of two
    done, length = np.zeros(1, np.uint64), 0
    with np.errstate(over="ignore"):
        while True:
            if n & size:
                done, length = _join(done, power, size, length), length + size
            if 2 * size > n:
                break
            power, size = _join(power, power, size, size), 2 * size
        done ^= done >> np.uint64(29)
        done *= np.uint64(0xBF58476D1CE4E5B9)
    return done


def _join(left: np.ndarray, right: np.ndarray, size: int, length: int) -> np.ndarray:
    """Hashes of n-grams of `length` tokens (`left`) followed by ones of `size` tokens (`right`)."""
    if not length:
        return right.copy()
    factor = np.uint64(pow(_BASE, size, 1 << 64))
    right = right[:, length:]
    return left[:, : right.shape[1]] * factor + right


def copied_shares(
    snapshot: Experience,
    texts: Sequence[np.ndarray],
    parents: Sequence[Tuple[int, ...]],
    last_key: int,
    cfg: DreamConfig,
) -> np.ndarray:
    """Share of each text's n-grams that stored text has too, float64 (B,).

    Stored text: the newest `cfg.copy_rows` experiences up to `last_key`, base mixture and quarantine included, and all
    parents. Then the dreams before it: what says the same as an earlier dream of the round is a copy as well.

    Args:
        texts: what follows the prompt of each dream, all of one length.
        parents: keys of each dream's parents.
    """
    n = min(cfg.ngram, len(texts[0]))
    grams_BG = ngram_hashes(np.stack(texts), n)
    wanted = np.unique(grams_BG)
    table = np.zeros(_TABLE, bool)
    table[wanted & np.uint64(_TABLE - 1)] = True
    hits = [np.empty(0, np.uint64)]
    rows = _compared_rows(snapshot, parents, last_key, cfg.copy_rows)
    for start in range(0, len(rows), _CHUNK):
        stored = ngram_hashes(snapshot.tokens(rows[start : start + _CHUNK]), n).ravel()
        hits.append(stored[table[stored & np.uint64(_TABLE - 1)]])
    known = np.isin(grams_BG, np.concatenate(hits))
    for row in range(1, len(known)):
        known[row] |= np.isin(grams_BG[row], grams_BG[:row])
    return known.mean(1)


def _compared_rows(snapshot: Experience, parents: Sequence[Tuple[int, ...]], last_key: int, newest: int) -> np.ndarray:
    """Rows of the newest experiences up to a key, and of all parents; ascending."""
    first = last_key - newest + 1 if newest else -len(snapshot)
    near = snapshot.rows_between(max(first, -len(snapshot)), last_key)
    named = [snapshot.rows_between(key, key) for keys in parents for key in keys]
    return np.unique(np.concatenate([near, *named]))
