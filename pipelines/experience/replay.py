"""Replay: which older experience is held, and draws from it. A function of keys, seed and step.

What a store of bounded size holds is a bottom-k sample: every experience has a number made of the seed and its key, and
the k smallest are held (Cohen, 1997: a reservoir whose content does not depend on the order of arrival). So any process
comes to the same rows from the same keys, whenever it looks.

Shapes: N rows held, n rows drawn.
"""

from __future__ import annotations

from typing import Any, Optional, Protocol

import numpy as np
import numpy.typing as npt

from pipelines.config.sleep import SleepConfig
from pipelines.experience.sampler import Rows, Sampler, build_sampler
from pipelines.experience.schema import DREAM_KEY, KINDS, Record

_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


class Experience(Protocol):
    """What replay asks of a version of the store: one on disk (`Snapshot`), or one in memory."""

    @property
    def keys(self) -> npt.NDArray[np.int64]:
        """Key of each row, in the order of commits."""

    @property
    def kinds(self) -> npt.NDArray[np.uint8]:
        """Kind of each row: its place in `KINDS`."""

    @property
    def source_ids(self) -> npt.NDArray[np.int32]:
        """Source of each row: its place in `sources`."""

    @property
    def sources(self) -> list[str]:
        """Names of the sources."""

    @property
    def surprise(self) -> npt.NDArray[np.float32]:
        """Surprise of each row, nats per token."""

    @property
    def context(self) -> int:
        """Tokens per sequence, less one."""

    def __len__(self) -> int:
        """Number of rows."""

    def tokens(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Tokens of rows (n, context + 1)."""

    def records(self, rows: npt.NDArray[np.int64]) -> list[Record]:
        """Whole rows; slow."""

    def rows_between(self, first_key: int, last_key: int) -> npt.NDArray[np.int64]:
        """Rows whose keys lie in [first_key, last_key]: base mixture first, then the stream; never dreams."""


def usable(experience: Experience) -> npt.NDArray[np.bool_]:
    """Rows that may be trained on: neither quarantined nor dreamt."""
    return (experience.kinds != KINDS.index("quarantined")) & (experience.keys < DREAM_KEY)


def priorities(keys: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.uint64]:
    """A number per key that looks random and depends on (seed, key) alone: SplitMix64's finaliser."""
    start = (seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % (1 << 64)
    x = keys.astype(np.uint64) + np.uint64(start)
    x = (x ^ (x >> np.uint64(30))) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    return np.asarray(x ^ (x >> np.uint64(31)))


def held_rows(rows: Rows, keys: npt.NDArray[np.int64], most: int, seed: int) -> Rows:
    """The rows of which a store of `most` rows holds the text, in their order."""
    if len(rows) <= most:
        return rows
    order = np.argpartition(priorities(keys[rows], seed), most)[:most] if most else np.empty(0, np.int64)
    return np.sort(rows[order])


class Replay:
    """Draws from older experience.

    Args:
        experience: a version of the store.
        rows: older rows, ascending.
        cfg: sampler, balance and bound of what is replayed.
        seed: of what is held. Draws have seeds of their own.
    """

    def __init__(self, experience: Experience, rows: Rows, cfg: SleepConfig, seed: int) -> None:
        most = cfg.replay_bytes // max(1, experience.context) if cfg.replay_bytes else len(rows)
        self.held = held_rows(rows, experience.keys, most, seed)
        """Rows that it holds, shape (N,)."""
        self.sampler: Optional[Sampler] = None
        if len(self.held):
            settings = {"half_life": cfg.half_life, "surprise_cap": cfg.surprise_cap, "source_cap": cfg.source_cap}
            self.sampler = build_sampler(cfg.sampler, experience, self.held, balance=cfg.balance, **settings)

    def draw(self, n: int, seed: int, step: int) -> Rows:
        """`n` rows, with replacement: a function of (seed, step) and what is held. None where nothing is."""
        if self.sampler is None or not n:
            return np.empty(0, np.int64)
        return self.sampler.draw(n, seed, step)[0]
