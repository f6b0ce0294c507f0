"""What a night trains on, who guides it, what of the model trains, and what a step of it costs.

Shapes: B sequences, S stored tokens (context + 1), T = S - 1 predicted tokens, V vocabulary, N sequences.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from nl_model.distillation import forward_kl
from nl_model.generate import Reader, SamplingConfig, sample
from nl_model.losses import token_nll
from nl_model.model import NestedLM
from nl_model.optim.levelwise import build_optimizer
from nl_model.slots import fold, remove_slots, slotted
from pipelines.compare.config import Night
from pipelines.compare.memory import Memory
from pipelines.compare.meter import Meter
from pipelines.compare.pulls import frozen_copy
from pipelines.config.schema import Config
from pipelines.sleep.objective import Lesson
from pipelines.sleep.schedule import learning_rate
from pipelines.sleep.student import Expansion, expand, student_step_flops

DREAM_PROMPT = 16
"""Tokens of stored text that a dream begins with."""

Gradients = List[Tuple[nn.Parameter, Optional[Tensor]]]
"""Parameters with what was in their `.grad`."""
Dream = Tuple[Tensor, Tensor]
"""Tokens (T,), and the anchor's logits (T, V) for what follows each of them."""


class NightTrainer:
    """Trains a model asleep, in place, on one day's text and a memory.

    Args:
        lr: peak step size.
        memory: what is replayed.
        anchor: the model that the last source left behind; its weights change at boundaries only.
    """

    def __init__(
        self, cfg: Config, night: Night, lr: float, seed: int, memory: Memory, meter: Meter, anchor: NestedLM
    ) -> None:
        self.night, self.lr, self.seed = night, lr, seed
        self.memory, self.meter, self.anchor = memory, meter, anchor
        self.anchored = True
        """Whether the anchor has been trained on anything."""
        self.size, self.context = cfg.sleep.batch, cfg.model.context
        self.optimizer_config = replace(cfg.sleep.optimizer, lr=lr)
        self.optimizer: Optional[torch.optim.Optimizer] = None
        self.random = np.random.default_rng([seed, 5])
        self.dreams_due, self.replayed, self.rounds = 0.0, 0, 0
        self.again: Gradients = []
        """Sums over the tokens of new sequences that were read again after the last step."""
        self.reread, self.turn = 0, 0
        self.floor = night.floor
        """Where the cosine of the present round ends, as a share of its peak."""
        receivers = [name for name, level in cfg.levels.items() if level.owner == "pool"] if night.slots else []
        self.receivers = receivers
        mode, said = "slots" if night.slots else "all", min(cfg.sleep.continuation, self.context // 2)
        self.mode = replace(cfg.sleep, mode=mode, slots=1, slot_rank=night.slots or 1, continuation=said)
        self.full = student_step_flops(anchor, Expansion(receivers), self.mode)

    @property
    def scarcity(self) -> float:
        """Share of all sequences seen that the memory does not hold; 0 where none has been seen."""
        return 1.0 - len(self.memory) / self.memory.seen if self.memory.seen else 0.0

    @property
    def pull(self) -> float:
        """Factor of what the last boundary's model weighs; none before it has learned anything."""
        return (self.scarcity if self.night.scarce else 1.0) * self.anchored

    def step_flops(self, recent: float) -> float:
        """FLOPs of one step with this share of recent experience, guides included: at most that where text is said."""
        night, old = self.night, 1 - recent
        guided = recent * bool(night.teacher) + old * bool(night.anchor * self.pull)
        passes = guided + night.on_policy + old * night.dream * self.pull
        return self.size * self.context * (self.full + passes * self.meter.forward)

    def forget_moments(self) -> None:
        """Begin the next round without the optimizer's moments."""
        self.optimizer = None

    def train(
        self, student: NestedLM, recent_NS: np.ndarray, shares: Tuple[float, float], steps: int, place: Tuple[int, int]
    ) -> float:
        """One round; returns the FLOPs it took.

        Args:
            student: what it is trained from; all levels train, or new slots that are folded in at the end.
            shares: of recent experience in a batch, at the start and at the end.
            place: (number of the round, rounds) under one schedule of the step size.
        """
        night, device = self.night, student.embedding.weight.device
        self.rounds += 1
        teacher = frozen_copy(student) if night.teacher else None
        pull = night.anchor * self.pull
        weights = replace(self.mode, teacher=night.teacher, anchor=pull, on_policy=night.on_policy)
        seed = 100_003 * self.seed + self.rounds
        trained = self._prepare(student, seed)
        lesson = Lesson(weights, steps, seed, student, teacher, self.anchor if pull else None)
        order, numbers = _passes_over(len(recent_NS), self.random), self._recent_counts(steps, *shares).tolist()
        due = [self._due(self.size - number) for number in numbers]
        dreamt = iter(self._dream(sum(due)))  # of one round: nothing of it is stored
        for step, (number, dreams) in enumerate(zip(numbers, due, strict=True)):
            mine = [next(order) for _ in range(number)]
            old = self.memory.draw(self.size - number - dreams, night.balance)
            rows = np.concatenate([recent_NS[mine], self.memory.tokens_NS[old]]) if len(old) else recent_NS[mine]
            tokens_BS = torch.from_numpy(rows).to(device)
            recent_B = torch.arange(len(rows), device=device) < number
            loss, _ = lesson.loss(step, student, tokens_BS, recent_B, np.arange(len(rows)))
            if dreams:
                dreamt_loss = dream_loss(student, [next(dreamt) for _ in range(dreams)])
                loss = loss * (1 - dreams / self.size) + dreamt_loss * (dreams / self.size)
            self._update(loss, trained, place[0] * steps + step, place[1] * steps)
        self._finish(student)
        said = sum(due) * self.context  # one pass makes a dream and says what the anchor makes of it
        return float((lesson.trained + said) * self.full + (lesson.passed + said) * self.meter.forward)

    @property
    def joined_flops(self) -> float:
        """FLOPs of a token in a step that `join` takes."""
        return float(self.meter.full + self.meter.forward * bool(self.night.lwf * self.pull))

    def held_loss(self, student: NestedLM, tokens_BS: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Logits (B, T, V), loss of text, and loss with what the anchor says of it as far as it has a say (B, T)."""
        logits_BTV = student(tokens_BS[:, :-1])
        nll_BT = token_nll(logits_BTV, tokens_BS[:, 1:])
        weight = self.night.lwf * self.pull
        if not weight:
            return logits_BTV, nll_BT, nll_BT
        with torch.no_grad():
            guide_BTV = self.anchor(tokens_BS[:, :-1])
        return logits_BTV, nll_BT, (1.0 - weight) * nll_BT + weight * forward_kl(logits_BTV, guide_BTV)

    def join(self, student: NestedLM, new_BS: Tensor, old: int, place: Tuple[int, int]) -> float:
        """One step on gradients that are there already and on replayed sequences; returns the FLOPs of these.

        Where stored text has been replayed often enough, the new text is read once more instead, with the weights after
        the step; that gradient joins the next step.

        Args:
            student: its gradients are sums over the tokens of `new_BS`; they are used up.
            old: replayed sequences, new ones that are read again included.
            place: (number of the step, steps) on the schedule of the step size.
        """
        trained = list(student.requires_grad_(True).parameters())
        if self.optimizer is None:
            self.optimizer = build_optimizer(trained, self.optimizer_config, student)
        stored = self._replayable(old, place) if len(new_BS) else old
        _add_gradients(self.again)
        total = (len(new_BS) + stored + self.reread) * self.context
        for parameter in trained:
            if parameter.grad is not None:
                parameter.grad /= total
        if stored:
            drawn = self.memory.tokens_NS[self.memory.draw(stored, self.night.balance)]
            rows_BS = torch.from_numpy(drawn).to(new_BS.device)
            (self.held_loss(student, rows_BS)[-1].sum() / total).backward()
        self._apply(trained, *place)
        self.again, self.reread = [], old - stored
        if self.reread:
            chosen = (self.turn + torch.arange(self.reread, device=new_BS.device)) % len(new_BS)
            self.turn += self.reread
            self.held_loss(student, new_BS[chosen])[-1].sum().backward()
            self.again = set_gradients_aside(student)
        return float(old * self.context * self.joined_flops)

    def _replayable(self, wanted: int, place: Tuple[int, int]) -> int:
        """How many stored sequences are replayed: where the store forgets, each `Night.repeats` times at most."""
        step, steps = place
        if not step:
            self.replayed = 0
        if self.scarcity:
            limit = int(self.night.repeats * len(self.memory) * (step + 1) / steps)
            wanted = max(0, min(wanted, limit - self.replayed))
        self.replayed += wanted
        return wanted

    def _prepare(self, student: NestedLM, seed: int) -> List[nn.Parameter]:
        """What trains, with an optimizer over it. seed: of new slots."""
        expansion = expand(student, self.receivers, self.mode, seed)
        frozen = set(expansion.frozen)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name not in frozen)
        trained = [p for p in student.parameters() if p.requires_grad]
        if self.optimizer is None or self.receivers or not self.night.keep_moments:
            self.optimizer = build_optimizer(trained, self.optimizer_config, student)
        return trained

    def _finish(self, student: NestedLM) -> None:
        """Fold slots into the weights beside them: after a night the model looks as before."""
        for level in (r for r in self.receivers if slotted(student, r)):
            fold(student, level)
        remove_slots(student)

    def _update(self, loss: Tensor, trained: List[nn.Parameter], step: int, steps: int) -> None:
        loss.backward()
        self._apply(trained, step, steps)

    def _apply(self, trained: List[nn.Parameter], step: int, steps: int) -> None:
        assert self.optimizer is not None
        torch.nn.utils.clip_grad_norm_(trained, self.optimizer_config.clip or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.lr, step, steps, floor=self.floor)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _recent_counts(self, steps: int, first: float, last: float) -> np.ndarray:
        """Recent sequences in each step's batch (steps,), from one share to another."""
        if not len(self.memory):
            first = last = 1.0
        wanted = np.cumsum(self.size * np.linspace(first, last, steps))
        return np.diff(np.floor(wanted + 0.5), prepend=0).astype(int)

    def _due(self, old: int) -> int:
        """How many of a batch's old sequences are dreamt; exact over time for any share."""
        self.dreams_due += old * self.night.dream * self.pull
        dreams = min(int(self.dreams_due), old, self.size - 1)
        self.dreams_due -= dreams
        return dreams

    def _dream(self, number: int) -> List[Dream]:
        """Continuations of stored text by the anchor."""
        if not number:
            return []
        device, size = self.anchor.embedding.weight.device, min(DREAM_PROMPT, self.context)
        rows_NS = self.memory.tokens_NS[self.memory.draw(number, self.night.balance)]
        starts_N = self.random.integers(self.context + 1 - size, size=number, endpoint=True)
        prompts = [row[start : start + size] for row, start in zip(rows_NS, starts_N, strict=True)]
        generator = torch.Generator(device).manual_seed(int(self.random.integers(1 << 62)))
        reader, said = Reader(self.anchor, number), [torch.from_numpy(np.stack(prompts)).to(device)]
        logits = [reader.feed(said[0])]
        while reader.position < self.context:
            said.append(sample(logits[-1][:, -1], SamplingConfig(), generator)[:, None])
            logits.append(reader.feed(said[-1]))
        return list(zip(torch.cat(said, 1), torch.cat(logits, 1), strict=True))


def dream_loss(student: NestedLM, dreams: Sequence[Dream]) -> Tensor:
    """Divergence of the student from the anchor on what the anchor dreamt, mean nats per token."""
    tokens_BT, guide_BTV = (torch.stack(part) for part in zip(*dreams, strict=True))
    return forward_kl(student(tokens_BT), guide_BTV).mean()


def set_gradients_aside(model: nn.Module) -> Gradients:
    """Take a model's gradients out of it."""
    found = [(parameter, parameter.grad) for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found


def _add_gradients(found: Gradients) -> None:
    """Add gradients to those that are there."""
    for parameter, gradient in found:
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _passes_over(rows: int, random: np.random.Generator) -> Iterator[int]:
    """Indices of all rows in a fresh order, again and again."""
    while True:
        yield from random.permutation(rows)
