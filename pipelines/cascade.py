"""The cascade: every level passes what it learned on to the next slower one, over any number of levels.

A transfer runs when its receiver's period ends, from the faster neighbour (sender) to it, in the order of the sleep
paper: compute, consolidate, update.

1. Compute: what the sender's gradient sum would make of its weights; not applied yet.
2. Consolidate: the teacher is the model as it is. The student is a copy with the sender's prospective weights, without
   the sender's expert slots, and with a new slot in the receiver; only that slot learns (or the receiver's own weights,
   where sleep.mode=dense).
3. Update: the model becomes the student. The sender has its new weights and no slots, the receiver keeps the new one.

Shapes: B sequences, S stored tokens (context + 1).
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from nl_model.clock import LevelClock
from nl_model.config import LevelConfig, ordered_levels
from nl_model.model import NestedLM
from nl_model.online import OnlineLevels
from nl_model.optim.levelwise import LevelOptimizers, build_optimizer
from nl_model.slots import FoldReport, activate, add_slots, fold, free_slot, reset_slots, slotted, train_names
from nl_model.weights import load_into
from pipelines.sleep import guide_logits, learning_rate, sleep_loss
from pipelines.sleep_config import SleepConfig
from pipelines.student import slot_config

StepBatches = Callable[[int], Tuple[Tensor, Tensor]]
"""From a step to its int64 tokens (B, S) and which of them are recent (B,): a pure function, such as
`RoundBatches.batch`."""


@dataclass(frozen=True)
class Transfer:
    """One due hand-over between neighbours."""

    sender: str
    """The faster level."""
    receiver: str
    """The slower level, whose period is over."""
    tokens: int
    """The boundary: a stream position in tokens."""


@dataclass(frozen=True)
class Cycle:
    """A finished transfer."""

    transfer: Transfer
    slot: Optional[int]
    """Number of the receiver's new slot; None in dense mode."""
    trained: Tuple[str, ...]
    """Names of the parameters that learned."""
    losses: Tuple[float, ...]
    """Loss of every step, before it, in nats per token."""
    folded: Optional[FoldReport] = None
    """Set where all of the receiver's slots were taken: they were folded into its weights first."""


def transfers_due(
    levels: Mapping[str, LevelConfig], before: int, after: int, step_tokens: int = 1
) -> Tuple[Transfer, ...]:
    """Transfers whose receiver has a boundary in (before, after], fastest sender first, so that news can travel on.

    The fastest level never receives. Where the stream jumps over several boundaries of a receiver, it receives once,
    at the last of them.

    Args:
        step_tokens: for levels whose period counts steps: tokens of one step.
    """
    clock = LevelClock.of(dict(levels), step_tokens=step_tokens)
    due = set(clock.due(before, after))
    pairs = [
        (sender, receiver) for sender, receiver in itertools.pairwise(ordered_levels(dict(levels))) if receiver in due
    ]
    return tuple(Transfer(s, r, after // clock.periods[r] * clock.periods[r]) for s, r in pairs)


@torch.no_grad()
def prospective(optimizers: LevelOptimizers, name: str) -> Dict[str, Tensor]:
    """What a level's pending write would make of its weights, by name; the weights themselves stay.

    The write counts as computed: its gradient sum is used up, its moments and counters move on.
    """
    parameters = optimizers.parameters[name]
    before = {key: p.detach().clone() for key, p in parameters.items()}
    if not optimizers.tokens[name]:
        return before
    optimizers.write(name)
    after = {key: p.detach().clone() for key, p in parameters.items()}
    for key, parameter in parameters.items():
        parameter.copy_(before[key])
    return after


class Cascade:
    """Runs transfers on one model, in one process. A function of the model, the batches and the seed.

    Costs the memory of two more models while a transfer runs.

    Args:
        model: gets slots in every level but the fastest, where sleep.mode=slots.
        cfg: mode (slots or dense), slots, mixing weights and optimizer of a transfer.
        seed: of new slots.
        anchor: guides the student on sequences that are not recent; None: true tokens alone do.

    Raises:
        ValueError: sleep.mode=all names no receiver, or the wiring is nested.
    """

    def __init__(self, model: NestedLM, cfg: SleepConfig, seed: int, anchor: Optional[NestedLM] = None) -> None:
        if cfg.mode == "all":
            raise ValueError("sleep.mode=all trains every level at once; a cascade needs sleep.mode=slots or dense")
        if model.wiring == "nested":
            raise ValueError(
                "model.wiring=nested sends a level back to its learned start at every boundary of the next slower one, "
                "where a cascade hands its weights over; use sequential or independent"
            )
        self.model, self.cfg, self.seed, self.anchor = model, cfg, seed, anchor
        if cfg.mode == "slots":
            add_slots(model, [n for n in model.level_names[1:] if not slotted(model, n)], slot_config(cfg))

    def advance(self, online: OnlineLevels, tokens: int, batches: StepBatches, steps: int) -> List[Cycle]:
        """Move the clock of a learner on this model; runs the transfers that are due, then the remaining writes.

        Args:
            online: observes losses of `model`; all senders are among its levels.
            tokens: how far.
            batches: experience of the transfers; its recent sequences are taught by the awake model.
            steps: of each transfer.
        """
        before, after = online.tokens, online.tokens + tokens
        cycles = []
        for transfer in transfers_due(self.model.level_configs, before, after):
            cycles.append(self.run(transfer, prospective(online.optimizers, transfer.sender), batches, steps))
        online.advance(tokens)  # a sender's gradient sum is used up: nothing is written twice
        return cycles

    def run(self, transfer: Transfer, sender: Mapping[str, Tensor], batches: StepBatches, steps: int) -> Cycle:
        """Consolidate and update.

        Args:
            sender: the sender's prospective weights by parameter name.
            batches, steps: what the student learns from, and how long.
        """
        teacher, student = copy.deepcopy(self.model), copy.deepcopy(self.model)
        teacher.requires_grad_(False)
        load_into(student, sender)
        reset_slots(student, transfer.sender)
        slot, names, report = None, list(student.parameters_of(transfer.receiver)), None
        if self.cfg.mode == "slots":
            slot, names, report = self._new_slot(student, transfer, batches(0)[0][:, :-1])
        losses = train_student(student, names, teacher, self.anchor, batches, steps, self.cfg)
        self.model.load_state_dict(student.state_dict())
        return Cycle(transfer, slot, tuple(names), losses, report)

    def _new_slot(
        self, student: NestedLM, transfer: Transfer, tokens_BT: Tensor
    ) -> Tuple[int, List[str], Optional[FoldReport]]:
        """Activate a free slot of the receiver; where there is none, fold those that are taken."""
        report, slot = None, free_slot(student, transfer.receiver)
        if slot is None:
            report = fold(student, transfer.receiver, tokens_BT.to(student.embedding.weight.device))
            slot = free_slot(student, transfer.receiver)
            assert slot is not None, "folding frees every slot"
        names = activate(student, transfer.receiver, slot, self.seed * 1_000_003 + transfer.tokens)
        return slot, names, report


def train_student(
    student: NestedLM,
    names: Sequence[str],
    teacher: Optional[NestedLM],
    anchor: Optional[NestedLM],
    batches: StepBatches,
    steps: int,
    cfg: SleepConfig,
) -> Tuple[float, ...]:
    """Train the named parameters of a student and no other, in this process; returns the loss of every step."""
    device = student.embedding.weight.device
    parameters = train_names(student, names)
    optimizer = build_optimizer(parameters, cfg.optimizer)
    guides = (teacher if cfg.teacher else None, anchor if cfg.anchor else None)
    losses = []
    for step in range(steps):
        tokens_BS, recent_B = (t.to(device) for t in batches(step))
        logits = guide_logits(*guides, tokens_BS, recent_B)
        loss, _ = sleep_loss(student(tokens_BS[:, :-1]), tokens_BS, recent_B, logits, cfg)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if cfg.optimizer.clip:
            nn.utils.clip_grad_norm_(parameters, cfg.optimizer.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg.optimizer.lr, step, steps)
        optimizer.step()
        losses.append(float(loss.detach()))
    return tuple(losses)
