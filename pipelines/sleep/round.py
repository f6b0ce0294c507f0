"""Asleep: the student learns recent experience from the teacher, old experience from the anchor, true tokens on both.

The student starts as the awake model at the snapshot; `sleep.mode` says what trains. Shapes: B sequences, S stored
tokens (context + 1), T = S - 1 predicted tokens.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from nl_model.distillation import Guide, distillation, divergence, top_k
from nl_model.losses import token_nll
from nl_model.model import NestedLM
from pipelines.config.dreams import DreamConfig
from pipelines.config.sleep import SleepConfig
from pipelines.experience import DREAM_KEY, KINDS, Sampler, Snapshot, build_sampler


@dataclass(frozen=True)
class RoundPlan:
    """Everything a round is a function of. The same plan gives the same candidate."""

    round: int
    """Number of the round, from 1."""
    snapshot: int
    """Version of the experience store."""
    first_key: int
    """First stream key that counts as recent."""
    last_key: int
    """Last stream key of the snapshot."""
    fast: str
    """File of the fast snapshot, relative to the run directory."""
    anchor: int
    """Release that the student starts from and that serves as anchor."""
    tokens: int
    """Stream position of the snapshot, in tokens."""
    steps: int
    """Steps to train."""
    seed: int
    """Seed of its batches."""
    recent_scale: float = 1.0
    """Factor of sleep.recent (pipelines/machine/replan.py)."""
    lr_scale: float = 1.0
    """Factor of the pool's step size."""
    dreams_stored: int = 0
    """Dreams that earlier rounds left in the store."""

    def to_json(self) -> Dict[str, Any]:
        """As a JSON-able mapping."""
        return asdict(self)


def num_steps(cfg: SleepConfig, recent: int) -> int:
    """Steps of a round over `recent` new experiences."""
    steps = max(1, math.ceil(cfg.tokens_per_token * recent / cfg.batch))
    return min(steps, cfg.max_steps) if cfg.max_steps else steps


def learning_rate(peak: float, step: int, steps: int, warmup: float = 0.1, floor: float = 0.05) -> float:
    """Step size of step 0 .. steps - 1: linear warm-up, then a cosine down to floor * peak."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return peak * (step + 1) / ramp
    progress = (step - ramp) / max(1, steps - ramp)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def mixing(kind: str, step: int, steps: int) -> float:
    """Factor of the guides' weights at step 0 .. steps - 1: 1, or from 1 down to 0, straight or by a cosine."""
    done = step / max(1, steps - 1)
    if kind == "constant":
        return 1.0
    return 1.0 - done if kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))


class RoundBatches:
    """Batches of a round: a pure function of (snapshot, plan, step). Recent rows come first, then replayed ones, then
    dreams.

    Recent experience is read in a seeded order, each once per pass; old experience is drawn by the sampler. Where there
    is only one of them to be had, it fills the batch; ValueError where there is neither. Dreams stand in for replayed
    rows, one after the other, evenly over the steps; like recent experience they are learned with the teacher.

    Args:
        dreams: tokens of this round's dreams, int64 (n, S). Stored ones are never drawn.
        mixing: how much of a batch is dreamt, on average over the steps (share, repeats).
    """

    def __init__(
        self,
        snapshot: Snapshot,
        plan: RoundPlan,
        cfg: SleepConfig,
        dreams: Optional[np.ndarray] = None,
        mixing: Optional[DreamConfig] = None,
    ) -> None:
        usable = (snapshot.kinds != KINDS.index("quarantined")) & (snapshot.keys < DREAM_KEY)
        recent = usable & (snapshot.keys >= plan.first_key) & (snapshot.keys <= plan.last_key)
        old = usable & (snapshot.keys < plan.first_key)
        self.snapshot, self.plan = snapshot, plan
        self.recent_rows = np.flatnonzero(recent)
        if not len(self.recent_rows) and not old.any():
            raise ValueError(f"round {plan.round}: no usable experience up to key {plan.last_key}")
        self.old: Optional[Sampler] = None
        self.num_recent = cfg.batch
        if old.any():
            self.num_recent = round(cfg.recent * cfg.batch) if len(self.recent_rows) else 0
            self.old = build_sampler(
                cfg.sampler,
                snapshot,
                np.flatnonzero(old),
                half_life=cfg.half_life,
                surprise_cap=cfg.surprise_cap,
                source_cap=cfg.source_cap,
            )
        self.num_old = cfg.batch - self.num_recent
        self.dreams = np.empty((0, snapshot.context + 1), np.int64) if dreams is None else dreams
        mixing = mixing or DreamConfig()
        often = mixing.repeats * len(self.dreams) / max(1, plan.steps)
        self.per_step = min(mixing.share * cfg.batch, often, self.num_old)
        """Dreams of a step, on average."""

    def recent_sources(self) -> List[str]:
        """Sources of the recent experience, by name."""
        names = self.snapshot.sources
        return sorted(names[i] for i in np.unique(self.snapshot.source_ids[self.recent_rows]))

    def rows(self, step: int) -> Tuple[np.ndarray, np.ndarray]:
        """Row numbers (B - dreams of the step,) of a step, and which of them are recent, bool of the same shape."""
        first = step * self.num_recent
        recent = [self._recent(first + i) for i in range(self.num_recent)]
        old = np.empty(0, np.int64)
        if self.old is not None and self.num_old:
            old = self.old.draw(self.num_old, self.plan.seed, step)[0][: self.num_old - len(self.dreamt(step))]
        rows = np.concatenate([np.asarray(recent, dtype=np.int64), old])
        return rows, np.arange(len(rows)) < self.num_recent

    def dreamt(self, step: int) -> np.ndarray:
        """Numbers of the dreams of a step, int64 (n,)."""
        first, last = math.floor(step * self.per_step), math.floor((step + 1) * self.per_step)
        return np.arange(first, last) % max(1, len(self.dreams))

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
        read = min(steps * self.num_recent, len(self.recent_rows))
        return np.sort(self.recent_rows[self._order(0)[:read]]) if read else self.recent_rows[:0]

    def keys(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """Keys of one rank's share of a step: int64 (B / world,); those of dreams are no experience's."""
        real = self.snapshot.keys[self.rows(step)[0]]
        return np.concatenate([real, DREAM_KEY + self.dreamt(step)])[rank::world]

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Tuple[Tensor, Tensor]:
        """One rank's share of a step: int64 tokens (B / world, S) and the mask (B / world,) of recent and dreamt."""
        rows, recent = self.rows(step)
        dreams = self.dreams[self.dreamt(step)]
        mine = np.arange(len(rows) + len(dreams))[rank::world]
        real, dreamt = mine[mine < len(rows)], mine[mine >= len(rows)] - len(rows)
        tokens = np.concatenate([self.snapshot.tokens(rows[real]).astype(np.int64), dreams[dreamt]])
        mask = np.concatenate([recent[real], np.ones(len(dreamt), bool)])
        return torch.from_numpy(tokens), torch.from_numpy(mask)


@torch.no_grad()
def guide_logits(
    teacher: Optional[NestedLM], anchor: Optional[NestedLM], sequences_BS: Tensor, recent_B: Tensor
) -> Dict[str, Tensor]:
    """Logits of the teacher on recent and of the anchor on old sequences; a model that is None is left out."""
    inputs_BT, guides = sequences_BS[:, :-1], {}
    if teacher is not None and bool(recent_B.any()):
        guides["teacher"] = teacher(inputs_BT[recent_B])
    if anchor is not None and not bool(recent_B.all()):
        guides["anchor"] = anchor(inputs_BT[~recent_B])
    return guides


def guide_divergence(logits_BTV: Tensor, guide: Guide, cfg: SleepConfig) -> Tensor:
    """Divergence of the student from a guide as configured, per token (B, T)."""
    if cfg.divergence != "topk":
        return divergence(logits_BTV, guide, cfg.divergence, cfg.jsd_beta)
    return divergence(logits_BTV, top_k(guide, cfg.top_k) if isinstance(guide, Tensor) else guide)


def guided(cfg: SleepConfig, recent_B: Tensor, factor: float = 1.0) -> List[Tuple[str, Tensor, float]]:
    """Each guide's name, its rows of a batch (B,) bool, and its weight times `factor` (see `mixing`)."""
    return [("teacher", recent_B, factor * cfg.teacher), ("anchor", ~recent_B, factor * cfg.anchor)]


def sleep_loss(
    logits_BTV: Tensor,
    sequences_BS: Tensor,
    recent_B: Tensor,
    guides: Mapping[str, Guide],
    cfg: SleepConfig,
    factor: float = 1.0,
) -> Tuple[Tensor, Dict[str, Tensor]]:
    """Loss of one sleep step in nats per token, and its detached parts by name.

    Args:
        logits_BTV: the student's logits on all of the batch.
        sequences_BS: int64 tokens.
        recent_B: which sequences are recent.
        guides: what `guide_logits` returned, or stored guides of the same rows.
        cfg: divergence and mixing weights.
        factor: of the mixing weights at this step.
    """
    nll_BT = token_nll(logits_BTV, sequences_BS[:, 1:])
    total_BT = nll_BT
    parts = {"truth_recent": nll_BT[recent_B], "truth_old": nll_BT[~recent_B]}
    for name, rows_B, weight in guided(cfg, recent_B, factor):
        if name in guides:
            divergence_BT = guide_divergence(logits_BTV[rows_B], guides[name], cfg)
            total_BT = total_BT.index_put((rows_B,), distillation(nll_BT[rows_B], divergence_BT, weight))
            parts[name] = divergence_BT
    return total_BT.mean(), means(parts)


def merge_weights(trained: Mapping[str, Tensor], anchor: Mapping[str, Tensor], weight: float) -> Dict[str, Tensor]:
    """(1 - weight) * trained + weight * anchor, for every tensor by name; on the devices of what has been trained."""
    return {name: torch.lerp(new, anchor[name].to(new), weight) for name, new in trained.items()}


def means(parts: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Detached means of what is not empty."""
    return {name: part.detach().mean() for name, part in parts.items() if part.numel()}
