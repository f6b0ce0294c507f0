"""Circadian in one process: wake and sleep as their rooms have them, on a memory of bounded size.

Nothing runs beside anything here, so that a trial is a function of its settings; what a run does in parallel counts the
same FLOPs. Shapes: B sequences, T predicted tokens, S = T + 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Dict, List, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from nl_model.clock import LevelClock
from nl_model.config import ordered_levels
from nl_model.flops import wake_step_flops
from nl_model.losses import token_nll
from nl_model.model import NestedLM
from nl_model.online import OnlineLevels
from pipelines.compare.asleep import Gradients, NightTrainer, set_gradients_aside
from pipelines.compare.config import Night
from pipelines.compare.material import Material, Segment
from pipelines.compare.memory import Memory
from pipelines.compare.meter import Meter
from pipelines.compare.pulls import frozen_copy
from pipelines.compare.trace import Trace, fresh_model, fresh_recall
from pipelines.config.schema import Config
from pipelines.gate.decision import check_forgetting, check_loss, decide
from pipelines.gate.evidence import Evidence, Storage
from pipelines.gate.probe import Score, measure
from pipelines.sleep.losses import merge_weights
from pipelines.sleep.schedule import learning_rate

GATES = 1
"""Times per segment that the gate judges: when its nights have cooled down. In the middle of a schedule, at the largest
step size, it throws away nights that would have come right (docs/LOG.md)."""
GATE_SHARE = 0.1
"""Share of what may be stored that the gate's held-out text may take; where it is more, there is no gate."""
MOST_SCARCE = 0.5
"""Share of the past that may be lost for a deep sleep to pay: a few steps at a fresh step size, over a store that is
soon known by heart, cost more than they bring (docs/LOG.md)."""
RECENT_SHARE = 0.25
"""Share of a bounded memory that holds a day which is not slept on yet; one batch at least."""


class CircadianTrainer:
    """Wakes and sleeps through the segments of a stream.

    Args:
        lr: peak step size asleep.
        epochs: FLOPs per stream token, in full training steps.
        capacity: bytes that may be stored.
    """

    def __init__(
        self,
        material: Material,
        night: Night,
        lr: float,
        epochs: float,
        capacity: float,
        seed: int,
        weights: Dict[str, Tensor],
        device: torch.device,
    ) -> None:
        cfg = _with_wake_batch(material.cfg, self.awake_batch(material.cfg, night))
        self.material, self.night, self.lr, self.epochs, self.device = material, night, lr, epochs, device
        self.cfg, self.size, self.width = cfg, cfg.sleep.batch, cfg.model.context + 1
        self.model = fresh_model(material, weights, device, cfg)
        self.meter = Meter.of(cfg, material.vocab_size)
        recall = fresh_recall(material, capacity)
        self.trace = Trace(material, self.meter, recall=recall, reads_with_recall=night.recall and recall is not None)
        owned = _written_awake(cfg, night)
        self.levels = OnlineLevels(self.model, owned) if owned else None
        if self.levels is not None and night.wake == "all":
            periods = self.levels.clock.periods
            self.levels.clock = LevelClock(dict.fromkeys(periods, min(periods.values())))
        self.wake_flops = self._awake_flops(owned)
        held_out = sum(probe.tokens[:, 1:].size for probe in material.gate_probes.values())
        self.gated = night.gate and held_out <= GATE_SHARE * capacity
        self.held_out = held_out if self.gated and capacity < float("inf") else 0
        self.memory = Memory(capacity - self.held_out, 0, seed, night.fewest)
        self.live, self.anchor = frozen_copy(self.model), frozen_copy(self.model)
        self.asleep = NightTrainer(cfg, night, lr, seed, self.memory, self.meter, self.anchor)
        self.asleep.anchored = material.has_base
        self.seen: List[str] = list(material.base_sources)
        self.anchor_row: Dict[str, Score] = {}
        self.position, self.credit, self.banked, self.rounds, self.rejected = 0, 0.0, 0.0, 0, 0
        self.unjudged = False
        if self.memory.rows(self.width, 1.0 - self._recent_share()) < 1:
            raise ValueError(
                f"a store of {capacity:,.0f} bytes does not hold one sequence of {self.width - 1} beside the present "
                "batch; use a larger regime or a smaller wake.batch"
            )

    def _awake_flops(self, owned: List[str]) -> float:
        """FLOPs per token of an awake step that writes these levels."""
        if len(owned) == len(self.cfg.levels):
            return self.meter.full
        if not owned:
            return self.meter.forward
        sides = {n: replace(level, owner="learner" if n in owned else "pool") for n, level in self.cfg.levels.items()}
        return wake_step_flops(self.cfg.model, sides, self.material.vocab_size)

    @staticmethod
    def awake_batch(cfg: Config, night: Night) -> int:
        """Sequences per awake step; 0: as configured."""
        return night.wake_batch

    def run(self) -> Trace:
        """Live through the whole stream; returns the trial's trace."""
        self.trace.score(self.model, 0)
        self.memory.add(self.material.base.tokens_NS, self.material.base.sources_N, 1.0 - self._recent_share())
        if self.gated:
            self.anchor_row = self._gate_scores(self.model)
        for number, segment in enumerate(self.material.segments, start=1):
            self.seen.extend(s for s in self._sources_of(segment) if s not in self.seen)
            days = self._days(len(segment.tokens_NS))
            for day, (first, last) in enumerate(days):
                self.asleep.floor = self.night.night_floor if self._will_sleep_deep else self.night.floor
                self._set_awake_rates(day, len(days))
                trained = self._live(segment, first, last, (day, len(days)))
                kept = segment.tokens_NS[first:last], segment.sources_N[first:last]
                self.memory.add(*kept, 1.0 - self._recent_share(), trained=trained)
            self._merge(number)
            if self._is_deep(number):
                first = days[-1][0] if self._recent_share() else 0
                self._deep_sleep(segment.tokens_NS[first:])
            _copy_weights(self.model, self.anchor)
            self.asleep.anchored = True
            self.trace.score(self.model, self.position)
        self.trace.notes.update(rounds=self.rounds, rejected=self.rejected)
        return self.trace

    def _live(self, segment: Segment, first: int, last: int, day: Tuple[int, int]) -> Sequence[int]:
        """One day awake, and the night after it; returns which of its sequences count as replayed once."""
        self._wake(segment, first, last)
        self._nap(segment, first, last, day)
        return ()

    @torch.no_grad()
    def _merge(self, number: int) -> None:
        """Average the weights with the last boundary's. number: of the segment that has ended."""
        weight = self.night.merge * self.asleep.pull
        if not weight:
            return
        new, old = (dict(model.named_parameters()) for model in (self.model, self.anchor))
        for name, merged in merge_weights(new, old, weight).items():
            new[name].copy_(merged)
        if self.gated and (self.banked or number < len(self.material.segments)):
            # What it had learned by heart is not what the next candidate stands against.
            self.anchor_row = self._gate_scores(self.model)
        self.unjudged = False

    def _sources_of(self, segment: Segment) -> List[str]:
        return [self.material.sources[i] for i in dict.fromkeys(segment.sources_N.tolist())]

    def _recent_share(self) -> float:
        """Share of a bounded memory for the present day: one batch at least."""
        if self.memory.capacity == float("inf"):
            return 0.0
        return min(1.0, max(RECENT_SHARE, self.size * (self.width - 1) / self.memory.capacity))

    def _days(self, rows: int) -> List[Tuple[int, int]]:
        """The stretches between two sleeps: as configured, shorter where a bounded memory holds no more."""
        longest = self.size if self.night.online else -(-rows // self.night.rounds)
        longest = -(-longest // self.size) * self.size
        if share := self._recent_share():
            fitting = self.memory.rows(self.width, share) // self.size * self.size
            longest = max(self.size, min(longest, fitting))
        return [(first, min(rows, first + longest)) for first in range(0, rows, longest)]

    def _set_awake_rates(self, day: int, days: int) -> None:
        """Step sizes of the awake levels: the configured ones, or these on the schedule of a segment's nights."""
        if self.levels is None:
            return
        scale = self.night.wake_lr * (learning_rate(1.0, day, days) if self.night.wake_cycle else 1.0)
        for name, optimizer in self.levels.optimizers.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.levels.optimizers.configs[name].lr * scale

    def _wake(self, segment: Segment, first: int, last: int) -> None:
        T, batch = self.width - 1, self.cfg.wake.batch
        self._train_levels()
        for start in range(first, last, batch):
            stop = min(last, start + batch)
            tokens_BS = torch.from_numpy(segment.tokens_NS[start:stop]).to(self.device)
            with torch.set_grad_enabled(self.levels is not None):
                logits_BTV = self.model(tokens_BS[:, :-1])
                nll_BT = token_nll(logits_BTV, tokens_BS[:, 1:])
            flops = self.wake_flops * nll_BT.numel()
            self._saw(tokens_BS, logits_BTV.detach(), nll_BT, segment.bytes_N[start:stop], flops)
            self.trace.inline_flops += self.wake_flops * nll_BT.numel()
            if self.levels is not None:
                self.levels.observe(nll_BT)
                self.levels.advance(nll_BT.numel())
        self.trace.holds(self.memory.bytes + (last - first) * T + self.held_out)

    def _saw(self, tokens_BS: Tensor, logits_BTV: Tensor, nll_BT: Tensor, bytes_B: np.ndarray, flops: float) -> None:
        """Note the loss of new text and what it took awake; the rest of its FLOPs is for sleep."""
        self.position += nll_BT.numel()
        self.trace.saw(self.position, tokens_BS, logits_BTV, nll_BT, bytes_B)
        self.meter.spend("wake", flops)
        self.trace.learner_flops += flops
        self.credit += self.epochs * self.meter.full * nll_BT.numel() - flops

    def _begin_candidate(self) -> None:
        """Keep what a rejection goes back to: the awake model before the first night not judged yet."""
        if not self.unjudged:
            _copy_weights(self.model, self.live)
            self.unjudged = True

    def _train_levels(self) -> None:
        if self.levels is not None:
            names = set(self.levels.names)
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(self.model.level_of(name) in names)

    def _is_deep(self, number: int) -> bool:
        """Whether a deep sleep, which spends what was kept for it, follows the segment of this number (from 1)."""
        if not self.night.bank:
            return False
        every = self.night.deep_every
        return number == len(self.material.segments) or bool(every and number % every == 0)

    def _nap(self, segment: Segment, first: int, last: int, day: Tuple[int, int]) -> None:
        """A night's round over one day.

        day: (number of the day in its segment, days of the segment).
        """
        self._keep(self.credit)
        night = self.night
        # One schedule of the step size spans a segment's nights, or every night has its own.
        place = day if night.online or night.cycle else (0, 1)
        recent = night.recent + (night.scarce_recent - night.recent) * self.asleep.scarcity
        shares = (recent, night.recent_end)
        self._sleep(segment.tokens_NS[first:last], shares, place, self._is_judged(day))

    @property
    def _will_sleep_deep(self) -> bool:
        return self.night.bank > 0 and self.asleep.scarcity < MOST_SCARCE

    def _keep(self, income: float) -> None:
        """Put a share of an income aside for the deep sleep, as far as it is there and has a use."""
        room = self.night.deep_passes * len(self.memory) * (self.width - 1) * self.meter.full - self.banked
        bank = self.night.bank if self._will_sleep_deep else 0.0
        kept = max(0.0, min(income * bank, room, self.credit))
        self.credit, self.banked = self.credit - kept, self.banked + kept

    def _deep_sleep(self, recent_NS: np.ndarray) -> None:
        """A round over everything, on the FLOPs that nights have kept for it."""
        self.credit, self.banked, self.asleep.floor = self.credit + self.banked, 0.0, self.night.floor
        self._sleep(recent_NS, (self.night.deep_recent, -1.0), (0, 1), True)

    def _sleep(self, recent_NS: np.ndarray, shares: Tuple[float, float], place: Tuple[int, int], judged: bool) -> None:
        """One round on the present credit: the student starts as the awake model, and all levels train.

        shares: of recent experience in a batch, at the start and at the end (negative: the same).
        place: (number of the round, rounds) under one schedule of the step size.
        """
        judged = judged and self.gated
        first, last = shares[0], shares[1] if shares[1] >= 0 else shares[0]
        price = self.asleep.step_flops((first + last) / 2)
        steps = int((self.credit - self._gate_flops * judged) // price)
        if steps < 1:
            return
        self.credit -= steps * price
        self.rounds += 1
        self._begin_candidate()
        pending = self._set_gradients_aside()
        spent = self.asleep.train(self.model, recent_NS, (first, last), steps, place)
        for parameter, gradient in pending:
            parameter.grad = gradient
        self.meter.spend("sleep", spent)
        self.trace.inline_flops += spent * self.night.online
        self.credit += steps * price - spent
        if judged:
            self._judge(self.model)

    def _set_gradients_aside(self) -> Gradients:
        """Gradient sums of periods that a sleep cuts through; they wait for the rest of their period."""
        return set_gradients_aside(self.model)

    @property
    def _gate_flops(self) -> float:
        return float(self.meter.forward * sum(p.tokens[:, 1:].size for p in self.material.gate_probes.values()))

    def _gate_scores(self, model: NestedLM) -> Dict[str, Score]:
        self.meter.spend("gate", self._gate_flops)
        self.credit -= self._gate_flops
        return {name: measure(model, probe) for name, probe in self.material.gate_probes.items()}

    def _is_judged(self, day: Tuple[int, int]) -> bool:
        """Whether the gate looks at this night: `GATES` times per segment, however short the days are."""
        number, days = day
        return (number + 1) * GATES // days > number * GATES // days

    def _judge(self, student: NestedLM) -> None:
        """Let a candidate go live, or go back to the live model; probes are not those that methods are judged on.

        What has not cooled down, since a deep sleep follows, is not turned down: that sleep's outcome is.
        """
        found = self._gate_scores(student)
        evidence = Evidence(found, self.anchor_row, found, self.seen, [], Storage("", [], [], {}))
        if decide(evidence, self.cfg.gate, (check_loss, check_forgetting)).promoted:
            self.anchor_row, self.unjudged = found, False
        elif self.asleep.floor <= self.night.floor:
            self.unjudged = False
            self.rejected += 1
            self.asleep.forget_moments()  # of a candidate that may have diverged
            _copy_weights(self.live, student)


def _written_awake(cfg: Config, night: Night) -> List[str]:
    """Names of the levels that are written awake."""
    mine = [name for name in ordered_levels(cfg.levels) if cfg.levels[name].owner == "learner"]
    return {"learner": mine, "fastest": mine[:1], "all": list(cfg.levels), "none": []}[night.wake]


def _with_wake_batch(cfg: Config, batch: int) -> Config:
    """The configuration with another awake batch, the periods of the learner's levels in proportion."""
    if not batch:
        return cfg
    levels = {
        name: replace(level, period=level.period * batch // cfg.wake.batch) if level.owner == "learner" else level
        for name, level in cfg.levels.items()
    }
    return replace(cfg, levels=levels, wake=replace(cfg.wake, batch=batch))


@torch.no_grad()
def _copy_weights(source: NestedLM, target: NestedLM) -> None:
    for mine, theirs in zip(target.parameters(), source.parameters(), strict=True):
        mine.copy_(theirs)
