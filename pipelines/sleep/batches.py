"""Batches of a round: recent experience, replayed older experience and dreams, as a function of the step.

Shapes: B sequences, S stored tokens (context + 1).
"""

from __future__ import annotations

import math
from typing import List, Optional, Tuple

import numpy as np
import torch

from pipelines.config.dreams import DreamConfig
from pipelines.config.sleep import SleepConfig
from pipelines.experience import DREAM_KEY
from pipelines.experience.replay import Experience, Replay, usable
from pipelines.sleep.plan import RoundPlan
from pipelines.sleep.training import ALONE, Batch, Place


class RoundBatches:
    """Batches of a round: a pure function of (snapshot, plan, step). Recent rows come first, then replayed ones, then
    dreams.

    Recent experience is read in a seeded order, each once per pass; old experience is drawn by the sampler. Their
    shares hold over the steps of a round, whatever the batch: a fifth of 4 sequences is 1 in most steps and none in
    every fifth. Where there is only one of them to be had, it fills the batch; ValueError where there is neither.
    Dreams stand in for replayed rows, one after the other, evenly over the steps; like recent experience they are
    learned with the teacher.

    Args:
        dreams: tokens of this round's dreams, int64 (n, S). Stored ones are never drawn.
        mixing: how much of a batch is dreamt, on average over the steps (share, repeats).
    """

    def __init__(
        self,
        snapshot: Experience,
        plan: RoundPlan,
        cfg: SleepConfig,
        dreams: Optional[np.ndarray] = None,
        mixing: Optional[DreamConfig] = None,
    ) -> None:
        fit = usable(snapshot)
        recent = fit & (snapshot.keys >= plan.first_key) & (snapshot.keys <= plan.last_key)
        old = np.flatnonzero(fit & (snapshot.keys < plan.first_key))
        self.snapshot, self.plan = snapshot, plan
        self.recent_rows = np.flatnonzero(recent)
        self.replay = Replay(snapshot, old, cfg, plan.store_seed)
        if not len(self.recent_rows) and not len(self.replay.held):
            raise ValueError(f"round {plan.round}: no usable experience up to key {plan.last_key}")
        self.size, self.recent_per_step = cfg.batch, float(cfg.batch)
        """Sequences of a step, and recent ones among them on average."""
        if len(self.replay.held):
            self.recent_per_step = cfg.recent * cfg.batch if len(self.recent_rows) else 0.0
        self.dreams = np.empty((0, snapshot.context + 1), np.int64) if dreams is None else dreams
        mixing = mixing or DreamConfig()
        often = mixing.repeats * len(self.dreams) / max(1, plan.steps)
        self.per_step = min(mixing.share * cfg.batch, often, self.size - math.ceil(self.recent_per_step))
        """Dreams of a step, on average."""

    def recent_sources(self) -> List[str]:
        """Sources of the recent experience, by name."""
        names = self.snapshot.sources
        return sorted(names[i] for i in np.unique(self.snapshot.source_ids[self.recent_rows]))

    def rows(self, step: int) -> Tuple[np.ndarray, np.ndarray]:
        """Row numbers (B - dreams of the step,) of a step, and which of them are recent, bool of the same shape."""
        recent = [self._recent(i) for i in range(self._recent_before(step), self._recent_before(step + 1))]
        num_old = self.size - len(recent)
        # All are drawn, whatever is dreamt instead of some: dreams change no draw.
        old = self.replay.draw(num_old, self.plan.seed, step)[: num_old - len(self.dreamt(step))]
        rows = np.concatenate([np.asarray(recent, dtype=np.int64), old])
        return rows, np.arange(len(rows)) < len(recent)

    def dreamt(self, step: int) -> np.ndarray:
        """Numbers of the dreams of a step, int64 (n,)."""
        first, last = math.floor(step * self.per_step), math.floor((step + 1) * self.per_step)
        return np.arange(first, last) % max(1, len(self.dreams))

    def _recent_before(self, step: int) -> int:
        """Recent sequences that the steps before this one read; a share such as 0.2 is no exact number."""
        return math.floor(step * self.recent_per_step + 1e-9)

    def _recent(self, position: int) -> int:
        epoch, place = divmod(position, len(self.recent_rows))
        return int(self.recent_rows[self._order(epoch)[place]])

    def _order(self, epoch: int) -> np.ndarray:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self.plan.seed, self.plan.round, epoch]).permutation(
                len(self.recent_rows)
            )
        return self._permutation

    def visited(self, steps: int) -> np.ndarray:
        """Rows of recent experience that `steps` steps read, each once, ascending."""
        read = min(self._recent_before(steps), len(self.recent_rows))
        return np.sort(self.recent_rows[self._order(0)[:read]]) if read else self.recent_rows[:0]

    def keys(self, step: int, place: Place = ALONE) -> np.ndarray:
        """Keys of one rank's share of a step: int64 (B / world,); those of dreams are no experience's."""
        return self._keys(self.rows(step)[0], self.dreamt(step), place)

    def _keys(self, rows: np.ndarray, dreamt: np.ndarray, place: Place) -> np.ndarray:
        return np.concatenate([self.snapshot.keys[rows], DREAM_KEY + dreamt])[place.rank :: place.world]

    def batch(self, step: int, place: Place = ALONE) -> Batch:
        """One rank's share of a step: what is recent or dreamt is marked as recent."""
        (rows, recent), dreamt = self.rows(step), self.dreamt(step)
        mine = np.arange(len(rows) + len(dreamt))[place.rank :: place.world]
        real, unreal = mine[mine < len(rows)], dreamt[mine[mine >= len(rows)] - len(rows)]
        tokens = np.concatenate([self.snapshot.tokens(rows[real]).astype(np.int64), self.dreams[unreal]])
        mask = np.concatenate([recent[real], np.ones(len(unreal), bool)])
        return Batch(torch.from_numpy(tokens), torch.from_numpy(mask), self._keys(rows, dreamt, place))
