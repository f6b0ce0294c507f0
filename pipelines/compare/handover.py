"""Circadian whose sleep goes on from the awake pass: new text is run forwards once, to score it and to learn it.

The learner runs every awake batch forwards. Over some of its sequences sleep goes on backwards, through all levels, and
steps on that and on replayed sequences; the others are learned by the awake levels alone. The next batch waits for this
step, or (`Night.late`) is read beside it with the weights before it.

Shapes: B sequences, T predicted tokens, S = T + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from nl_model.losses import token_nll
from pipelines.compare.asleep import Gradients
from pipelines.compare.circadian import CircadianTrainer
from pipelines.compare.config import Night
from pipelines.compare.material import Segment
from pipelines.config.schema import Config

LEAST_REPLAY = 0.5
"""FLOPs that every new sequence which sleep takes must leave for replay, at least, in those of training on it."""
PLENTY = 5 / 3
"""FLOPs per stream token, in full training steps, from which on `Night.handover` holds; with fewer it falls with what
the awake pass leaves of them, so that over time there is as much replay per new sequence."""
LEAST_TO_WRITE = 0.5
"""Part of that which must be left for the awake levels to be written at all: what they forget costs more than they
learn where sleep is too short to mend it (docs/LOG.md)."""


@dataclass(frozen=True)
class Handed:
    """What the learner hands over of a batch."""

    gradients: Gradients
    """Sums over the sequences taken."""
    new_BS: Tensor
    """These sequences."""
    day: Tuple[int, int]
    """(number of the batch in its segment, batches of the segment)."""


class HandoverTrainer(CircadianTrainer):
    """Lives through a stream with a sleeping step per awake batch."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self._plenty() < LEAST_TO_WRITE:
            self.levels, self.wake_flops = None, self.meter.forward
        self.due = 0.0
        """Sequences that the configured share gives sleep beside those that it has taken."""
        self.handed: Optional[Handed] = None

    def _plenty(self) -> float:
        """What the awake pass leaves of the FLOPs, by what it leaves where there are plenty; at most 1."""
        full = self.meter.full
        return max(0.0, min(1.0, (self.epochs * full - self.wake_flops) / (PLENTY * full - self.wake_flops)))

    @staticmethod
    def awake_batch(cfg: Config, night: Night) -> int:
        """Half a sleeping batch, so that replay fills the other half."""
        return night.wake_batch or max(1, cfg.sleep.batch // 2)

    def _recent_share(self) -> float:
        if self.memory.capacity == float("inf"):
            return 0.0
        batches = 2 if self.night.late else 1  # the one before it waits for its step
        return min(1.0, batches * self.cfg.wake.batch * (self.width - 1) / self.memory.capacity)

    def _days(self, rows: int) -> List[Tuple[int, int]]:
        return [(first, min(rows, first + self.cfg.wake.batch)) for first in range(0, rows, self.cfg.wake.batch)]

    def _live(self, segment: Segment, first: int, last: int, day: Tuple[int, int]) -> Sequence[int]:
        """One awake batch and a sleeping step, on this batch or on the one before it."""
        rows, T, meter = last - first, self.width - 1, self.meter
        tokens_BS = torch.from_numpy(segment.tokens_NS[first:last]).to(self.device)
        taken, pending = self._taken(rows), self._set_gradients_aside()
        self.model.requires_grad_(True)
        learned = self._learn(tokens_BS[:taken])
        handed = Handed(self._set_gradients_aside(), tokens_BS[:taken], day)
        _give_back(pending)
        written = self._write_awake(tokens_BS[taken:], rows)
        logits_BTV, nll_BT = (torch.cat(parts) for parts in zip(learned, written, strict=True))
        waiting = len(self.handed.new_BS) if self.handed else 0
        self.trace.holds(self.memory.bytes + (rows + waiting) * T + self.held_out)
        awake = (meter.forward * taken + self.wake_flops * (rows - taken)) * T
        self._saw(tokens_BS, logits_BTV, nll_BT, segment.bytes_N[first:last], awake)
        backward, gate = self._handed_flops * taken * T, self._gate_flops * self.gated / day[1]
        meter.spend("sleep", backward)
        self.trace.inline_flops += awake + (0.0 if self.night.late else backward)
        self.credit -= backward + gate  # the gate looks once, after the last batch
        self._keep(self.epochs * meter.full * rows * T - awake - backward - gate)
        self._step()
        self.handed, is_last = handed, day[0] + 1 == day[1]
        if is_last or not self.night.late:
            self._step()
        if is_last and self.gated:
            self.credit += gate * day[1]
            if self.unjudged and self.credit >= (1.0 - 1e-9) * self._gate_flops:  # never on FLOPs that are not there
                self._judge(self.model)
        return range(taken)

    def _taken(self, rows: int) -> int:
        """How many sequences of an awake batch sleep takes, as far as there are FLOPs for them and some replay.

        The configured share of them, or more: it rises to 1 with the share of the past that is not held. With fewer
        FLOPs than plenty it is less.
        """
        share = (self.night.handover + (1.0 - self.night.handover) * self.asleep.scarcity) * self._plenty()
        self.due = min(self.due + share * rows, rows + 1.0)
        price = (LEAST_REPLAY * self.meter.full + self._handed_flops) * (self.width - 1)
        credit = self.credit + (self.epochs * self.meter.full - self.wake_flops) * rows * (self.width - 1)
        taken = max(0, min(rows, int(self.due + 1e-9), int(credit // price)))
        self.due -= taken
        return taken

    @property
    def _handed_flops(self) -> float:
        """What sleep spends on a token handed over: a step's FLOPs but for the awake pass."""
        return self.asleep.joined_flops - self.meter.forward

    def _learn(self, tokens_BS: Tensor) -> Tuple[Tensor, Tensor]:
        """Run what is handed over forwards and backwards, gradients being sums; logits (B, T, V) and loss (B, T)."""
        logits_BTV, nll_BT, loss_BT = self.asleep.held_loss(self.model, tokens_BS)
        loss_BT.sum().backward()
        return logits_BTV.detach(), nll_BT.detach()

    def _write_awake(self, rest_BS: Tensor, rows: int) -> Tuple[Tensor, Tensor]:
        """Score what sleep does not take of a batch of `rows` and write the awake levels that are due.

        Returns logits (B, T, V) and loss (B, T).
        """
        self._train_levels()
        with torch.set_grad_enabled(self.levels is not None):
            logits_BTV = self.model(rest_BS[:, :-1])
            rest_BT = token_nll(logits_BTV, rest_BS[:, 1:])
        if self.levels is not None:
            if len(rest_BS):
                self.levels.observe(rest_BT)
            self.levels.advance(rows * (self.width - 1))
        return logits_BTV.detach(), rest_BT.detach()

    def _step(self) -> None:
        """The sleeping step on what was handed over last and on as many replayed sequences as there are FLOPs for."""
        if self.handed is None:
            return
        handed, self.handed, T = self.handed, None, self.width - 1
        old = max(0, int(self.credit // (self.asleep.joined_flops * T))) if len(self.memory) else 0
        if not len(handed.new_BS) and not old:
            return
        self._begin_candidate()
        pending = self._set_gradients_aside()
        _give_back(handed.gradients)
        spent = self.asleep.join(self.model, handed.new_BS, old, handed.day)
        self.model.zero_grad(set_to_none=True)
        _give_back(pending)
        self.rounds += 1
        self.credit -= spent
        self.meter.spend("sleep", spent)
        self.trace.inline_flops += 0.0 if self.night.late else spent


def _give_back(gradients: Gradients) -> None:
    for parameter, gradient in gradients:
        parameter.grad = gradient
