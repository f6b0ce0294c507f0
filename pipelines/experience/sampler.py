"""Which older experience is replayed: samplers that are pure functions of rows, seed and step.

A draw is with replacement. The table of cumulative probabilities is built once per (snapshot, rows); a draw then costs
O(log n) per row. The random numbers of step s are block s of a counter-based generator keyed by the seed, so any
process may draw any step, in any order, and gets the same rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipelines.config.sleep import SAMPLERS

if TYPE_CHECKING:
    from pipelines.experience.replay import Experience

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def uniforms(n: int, seed: int, step: int) -> Floats:
    """`n` numbers in [0, 1), float64, a function of (seed, step) alone. Both must be at least 0."""
    if seed < 0 or step < 0:
        raise ValueError(f"seed={seed} and step={step} must be at least 0")
    # The step sits above the words that the generator counts in: blocks of different steps never overlap.
    generator = np.random.Philox(key=seed, counter=np.array([0, 0, step, 0], np.uint64))
    return np.asarray(generator.random_raw(n) >> np.uint64(11)) * 2.0**-53


def cap_shares(weights: Floats, cap: float) -> Floats:
    """Shares proportional to `weights` (>= 0), clipped so that none exceeds `cap`; they sum to 1. Shape (n,).

    What is clipped goes to the others in proportion (water-filling), and evenly to weights of zero once all others are
    at the cap. A cap below 1/n cannot be met and is relaxed to 1/n.
    """
    count = len(weights)
    cap = max(float(cap), 1.0 / count)
    order = np.argsort(-weights, kind="stable")
    ranked = weights[order]
    rest = np.append(np.cumsum(ranked[::-1])[::-1], 0.0)  # rest[k]: weight outside the k largest
    left = np.maximum(1.0 - cap * np.arange(count + 1), 0.0)  # left[k]: share left when the k largest are at the cap
    fits = ranked * left[:-1] <= cap * rest[:-1]
    clipped = int(np.argmax(fits)) if fits.any() else count
    shares = np.full(count, cap)
    if rest[clipped] > 0:
        shares[clipped:] = ranked[clipped:] * (left[clipped] / rest[clipped])
    elif clipped < count:
        shares[clipped:] = left[clipped] / (count - clipped)
    result = np.empty(count)
    result[order] = shares / shares.sum()
    return result


class _Table:
    """Draws rows by a table of cumulative probabilities."""

    def __init__(self, rows: Rows, shares: Floats) -> None:
        self.rows, self.shares = rows, shares
        """The candidates and the probability of each, both of shape (n,)."""
        self._cumulative = np.cumsum(shares)

    def draw(self, n: int, seed: int, step: int) -> tuple[Rows, Floats]:
        """(rows, probability of each in one draw), both of shape (n,): a function of (seed, step) and the table."""
        points = uniforms(n, seed, step) * self._cumulative[-1]
        places = np.searchsorted(self._cumulative, points, side="right")
        return self.rows[places], self.shares[places]


class Uniform:
    """Every row alike; needs no table."""

    def __init__(self, rows: Rows) -> None:
        """`rows`: the candidates, shape (n,). Raises ValueError if there are none."""
        self.rows = _candidates(rows)

    @property
    def shares(self) -> Floats:
        """Probability of each row in one draw (n,)."""
        return np.full(len(self.rows), 1.0 / len(self.rows))

    def draw(self, n: int, seed: int, step: int) -> tuple[Rows, Floats]:
        """(rows, probability of each in one draw), both of shape (n,)."""
        places = (uniforms(n, seed, step) * len(self.rows)).astype(np.int64)
        return self.rows[places], np.full(n, 1.0 / len(self.rows))


class Recency(_Table):
    """Weight 2^(-age / half_life), the age counted in experiences behind the newest candidate."""

    def __init__(self, snapshot: Experience, rows: Rows, half_life: float) -> None:
        """`half_life` in experiences. Rows of the base mixture count as older than the stream."""
        if not half_life > 0:
            raise ValueError(f"half_life={half_life} must be positive")
        keys = snapshot.keys[_candidates(rows)]
        weights = np.exp2((keys - keys.max()) / half_life)
        super().__init__(rows, weights / weights.sum())


class Surprise(_Table):
    """Weight by surprise (0 where it is not finite), with two caps, because surprise can be bought with odd text.

    Before sources are looked at, no row weighs more than `cap` times the mean row. Then no source gets more than the
    share `source_cap` (or 1 / number of sources, if that is more); rows of the other sources gain in proportion.
    """

    def __init__(self, snapshot: Experience, rows: Rows, cap: float, source_cap: float) -> None:
        """`cap` in multiples of the mean weight, at least 1; `source_cap` in [0, 1]."""
        if not cap >= 1 or not 0 <= source_cap <= 1:
            raise ValueError(f"surprise cap={cap} must be at least 1 and source_cap={source_cap} lie between 0 and 1")
        rows = _candidates(rows)
        surprise = snapshot.surprise[rows].astype(np.float64)
        surprise = np.where(np.isfinite(surprise), np.maximum(surprise, 0.0), 0.0)
        shares = cap_shares(surprise, cap / len(rows))
        present, codes = np.unique(snapshot.source_ids[rows], return_inverse=True)
        before = np.bincount(codes, shares, minlength=len(present)).astype(np.float64)
        sizes = np.bincount(codes, minlength=len(present))
        wanted = cap_shares(before, source_cap)
        silent = before[codes] == 0
        within = np.where(silent, 1.0 / sizes[codes], shares / np.where(silent, 1.0, before[codes]))
        super().__init__(rows, within * wanted[codes])


class Balanced(_Table):
    """Another sampler's shares, times a power of each source's number of rows: labels are all that is known of
    sources."""

    def __init__(self, snapshot: Experience, inner: Uniform | Recency | Surprise, balance: float) -> None:
        """`balance`: 0 changes nothing, 1 gives every source the same share (of the same sampler)."""
        codes = snapshot.source_ids[inner.rows]
        counts = np.bincount(codes)
        shares = inner.shares * counts[codes].astype(np.float64) ** -balance
        super().__init__(inner.rows, shares / shares.sum())


Sampler = Uniform | Recency | Surprise | Balanced


def build_sampler(
    name: str,
    snapshot: Experience,
    rows: Rows,
    *,
    balance: float = 0.0,
    half_life: float = 2048,
    surprise_cap: float = 3.0,
    source_cap: float = 0.5,
) -> Sampler:
    """The sampler `name` (uniform, recency or surprise) over `rows` of `snapshot`; takes the fields of SleepConfig."""
    inner: Uniform | Recency | Surprise
    if name == "uniform":
        inner = Uniform(rows)
    elif name == "recency":
        inner = Recency(snapshot, rows, half_life)
    elif name == "surprise":
        inner = Surprise(snapshot, rows, surprise_cap, source_cap)
    else:
        raise ValueError(f"sampler={name!r} is unknown; use one of {', '.join(SAMPLERS)}")
    return Balanced(snapshot, inner, balance) if balance else inner


def _candidates(rows: Rows) -> Rows:
    rows = np.asarray(rows, np.int64)
    if not len(rows):
        raise ValueError("there are no rows to draw from; wait for experience, or widen the range of keys")
    return rows
