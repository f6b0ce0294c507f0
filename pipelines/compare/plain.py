"""Plain online training with replay and what else opponents add to it; and joint training, the upper bound.

A batch holds new sequences, in stream order, and replayed ones. FLOPs that a method saves on replay buy it further
passes over the present stretch, as far as it may store it.

Shapes: B sequences, T predicted tokens, S = T + 1, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Dict, List, Optional, Set, Tuple

import numpy as np
import torch
from torch import Tensor

from nl_model.distillation import forward_kl
from nl_model.losses import token_nll
from nl_model.optim.levelwise import build_optimizer
from nl_model.recall import Recall
from pipelines.compare.config import Method
from pipelines.compare.material import Material, Segment
from pipelines.compare.memory import TOP_BYTES, Memory
from pipelines.compare.meter import Meter
from pipelines.compare.pulls import (
    AverageWeights,
    ElasticWeights,
    adapt,
    frozen_copy,
    keep_top,
    top_divergence,
)
from pipelines.compare.trace import Trace, fresh_model, fresh_recall
from pipelines.sleep.schedule import learning_rate

FISHER_SEQUENCES = 64
"""Sequences per boundary that the Fisher diagonal is estimated on."""
WINDOW_SHARE = 0.25
"""Share of a bounded memory that holds new text which is read more than once, beside what is replayed."""
WARM_STEPS = 50
"""Warm-up of a constant step size."""


@dataclass(frozen=True)
class Batch:
    """One training step's sequences."""

    tokens_BS: Tensor
    new: int
    """How many of them, at the front, are new."""
    places: List[int]
    """Their places in the segment."""
    old: np.ndarray
    """Indices of the others in the memory."""


class PlainTrainer:
    """Learns the segments of a stream one after the other.

    Args:
        epochs: FLOPs per stream token, in full training steps.
        capacity: bytes that may be stored.
    """

    def __init__(
        self,
        material: Material,
        method: Method,
        lr: float,
        epochs: float,
        capacity: float,
        seed: int,
        weights: Dict[str, Tensor],
        device: torch.device,
    ) -> None:
        cfg = material.cfg
        self.material, self.method, self.lr, self.epochs, self.device = material, method, lr, epochs, device
        self.seed = seed
        self.size, self.width = cfg.sleep.batch, cfg.model.context + 1
        self.model = fresh_model(material, weights, device)
        self.meter = Meter.of(cfg, material.vocab_size)
        self.trace = Trace(material, self.meter, recall=self._recall(capacity))
        generator = torch.Generator().manual_seed(seed)
        self.generator = generator
        self.adapters = adapt(self.model, method.lora, generator) if method.lora else []
        self.optimizer_config = replace(cfg.sleep.optimizer, lr=lr)
        self.optimizer = self._optimizer()
        self.top = _fitting_top(method, capacity, self.size * (self.width - 1)) if method.der else 0
        self.memory = Memory(capacity, TOP_BYTES * self.top, seed)
        self.elastic = ElasticWeights(self.model, method.ewc) if method.ewc else None
        self.average = AverageWeights(self.model, method.ema) if method.ema else None
        self.teacher = frozen_copy(self.model) if method.lwf and material.has_base else None
        self.boundary = frozen_copy(self.model) if method.merge else None
        self.outer = [p.detach().clone() for p in self.model.parameters()] if method.reptile else []
        self.steps_done, self.credit, self.position = 0, 0.0, 0
        self.replay = method.replay
        """Share of replayed sequences at present: none while nothing is stored."""
        self.unpaid: Set[bytes] = set()
        """Sequences of the base whose log-probabilities have not been computed yet."""
        self.kept: Dict[int, Tuple[np.ndarray, np.ndarray]] = {}
        self.seen_segment: Optional[Segment] = None
        self.visited = np.zeros(0, bool)

    def _recall(self, capacity: float) -> Optional[Recall]:
        return fresh_recall(self.material, capacity)

    def _optimizer(self) -> torch.optim.Optimizer:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return build_optimizer(trained, self.optimizer_config, self.model)

    @property
    def step_flops(self) -> float:
        """FLOPs of one step, everything that belongs to it included."""
        tokens, meter, method = self.size * (self.width - 1), self.meter, self.method
        full = float(meter.full)
        if method.lora:  # resting weights want no gradient; adapters have two products forward and four backward
            shapes = [a.inner.weight.shape for a in self.adapters]
            full -= sum(2 * out * size for out, size in shapes) + 2 * self.model.head.weight.numel()
            full += sum(6 * method.lora * (out + size) for out, size in shapes)
        full += meter.forward if self.teacher is not None else 0.0
        return tokens * full

    def run(self) -> Trace:
        """Learn the whole stream; returns the trial's trace."""
        self.trace.score(self.model, 0)
        if self.method.replay:
            base = self.material.base
            self._store(base.tokens_NS, base.sources_N, 1.0 - self._window_share)
        if self.elastic is not None and self.material.has_base:
            self._weigh(self.material.base)
        for segment in self.material.segments:
            self._learn(segment)
            self._boundary(segment)
        self.trace.learner_flops = self.trace.inline_flops = self.meter.total
        return self.trace

    def _learn(self, segment: Segment) -> None:
        rows, T = len(segment.tokens_NS), self.width - 1
        self.replay = self.method.replay if len(self.memory) else 0.0
        self.credit += self.epochs * self.meter.full * rows * T
        steps = int(self.credit // self.step_flops)
        steps = max(0, int((self.credit - self._expected_pay(steps)) // self.step_flops))
        self.credit -= steps * self.step_flops
        counts = _new_counts(steps, self.size, self.replay)
        window = self._window(rows)
        step = 0
        for first in range(0, rows, window):
            last = min(rows, first + window)
            until = round(steps * last / rows)
            places = _visits(first, last, counts[step:until])
            for chosen in places:
                self._step(self._batch(segment, chosen), segment, learning_rate_of(self, step, steps))
                step += 1
            self._remember(segment, first, last)
        self.position += rows * T

    @property
    def _passes_again(self) -> bool:
        """Whether new text is read more than once, and so has to be held for a while."""
        tokens = self.size * (self.width - 1)
        return self.epochs * self.meter.full * (1 - self.replay) * tokens / self.step_flops > 1 + 1e-9

    @property
    def _window_share(self) -> float:
        """Share of a bounded capacity that the present stretch takes."""
        if not self._passes_again or self.memory.capacity == float("inf"):
            return 0.0
        if not self.method.replay:
            return 1.0
        return min(1.0, max(WINDOW_SHARE, self.size * (self.width - 1) / self.memory.capacity))

    def _window(self, rows: int) -> int:
        """Sequences of the present stretch to hold at a time."""
        share = self._window_share
        stretch = -(-rows // self.method.joins)
        return max(self.size, min(stretch, self.memory.rows(self.width, share))) if share else max(self.size, stretch)

    def _batch(self, segment: Segment, places: List[int]) -> Batch:
        number = self.size - len(places)
        old = np.empty(0, np.int64)
        tokens = segment.tokens_NS[places]
        if number and len(self.memory):
            old = self.memory.draw(number, self.method.balance)
            self._pay(old)
            tokens = np.concatenate([tokens, self.memory.tokens_NS[old]])
        return Batch(torch.from_numpy(tokens).to(self.device), len(places), places, old)

    def _step(self, batch: Batch, segment: Segment, lr: float) -> None:
        logits_BTV = self.model(batch.tokens_BS[:, :-1])
        nll_BT = token_nll(logits_BTV, batch.tokens_BS[:, 1:])
        self._note(batch, segment, nll_BT, logits_BTV)
        loss = self._loss(batch, nll_BT, logits_BTV)
        loss.backward()
        clip = self.optimizer_config.clip or float("inf")
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        self.meter.spend("train", self.step_flops)
        if self.average is not None:
            self.average.step()
        if self.outer and self.steps_done % self.method.reptile_every == 0:
            self._outer_step()

    def _loss(self, batch: Batch, nll_BT: Tensor, logits_BTV: Tensor) -> Tensor:
        method, total_BT = self.method, nll_BT
        if self.teacher is not None:
            with torch.no_grad():
                guide_BTV = self.teacher(batch.tokens_BS[:, :-1])
            total_BT = (1 - method.lwf) * nll_BT + method.lwf * forward_kl(logits_BTV, guide_BTV)
        if method.der and len(batch.old) and self.memory.ids_NTK is not None and self.memory.logs_NTK is not None:
            ids = torch.from_numpy(self.memory.ids_NTK[batch.old]).to(self.device)
            logs = torch.from_numpy(self.memory.logs_NTK[batch.old]).to(self.device)
            pull = top_divergence(logits_BTV[batch.new :], ids, logs)
            mixed = (1 - method.der) * total_BT[batch.new :] + method.der * pull
            total_BT = torch.cat([total_BT[: batch.new], mixed])
        loss = total_BT.mean()
        return loss + self.elastic.penalty() if self.elastic is not None else loss

    def _note(self, batch: Batch, segment: Segment, nll_BT: Tensor, logits_BTV: Tensor) -> None:
        """The online loss of sequences seen for the first time, and what is stored beside them."""
        fresh = [i for i, place in enumerate(batch.places) if self._is_first(segment, place)]
        if not fresh:
            return
        places = [batch.places[i] for i in fresh]
        position = self.position + (max(places) + 1) * (self.width - 1)
        seen = batch.tokens_BS[fresh], logits_BTV[fresh], nll_BT[fresh]
        self.trace.saw(position, *seen, segment.bytes_N[places])
        if self.method.der:
            ids, logs = keep_top(logits_BTV[fresh], self.top)
            for place, i, log in zip(places, ids.cpu().numpy(), logs.cpu().numpy(), strict=True):
                self.kept[place] = (i, log)

    def _is_first(self, segment: Segment, place: int) -> bool:
        if self.seen_segment is not segment:
            self.seen_segment, self.visited = segment, np.zeros(len(segment.tokens_NS), bool)
        first = not self.visited[place]
        self.visited[place] = True
        return bool(first)

    def _remember(self, segment: Segment, first: int, last: int) -> None:
        share = 1.0 - self._window_share
        self.trace.holds(self.memory.bytes + (last - first) * (self.width - 1) * self._passes_again)
        if self.method.replay:
            if self.method.der:
                there = [p for p in range(first, last) if p in self.kept]
                kept = tuple(np.stack([self.kept[p][part] for p in there]) for part in (0, 1)) if there else None
                tokens, sources = segment.tokens_NS[there], segment.sources_N[there]
                self.memory.add(tokens, sources, share, kept)  # type: ignore[arg-type]
            else:
                self._store(segment.tokens_NS[first:last], segment.sources_N[first:last], share)
        self.kept.clear()
        self.trace.holds(self.memory.bytes)

    def _store(self, tokens_NS: np.ndarray, sources_N: np.ndarray, share: float) -> None:
        kept = None
        if self.method.der and len(tokens_NS):
            kept = self._kept_of(tokens_NS)
        self.memory.add(tokens_NS, sources_N, share, kept)
        self.trace.holds(self.memory.bytes)

    @torch.no_grad()
    def _kept_of(self, tokens_NS: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """Log-probabilities of the base on its own text; their FLOPs count once they are used."""
        parts = []
        for start in range(0, len(tokens_NS), 32):
            tokens = torch.from_numpy(tokens_NS[start : start + 32]).to(self.device)
            parts.append(keep_top(self.model(tokens[:, :-1]), self.top))
        self.unpaid = {row.tobytes() for row in tokens_NS}
        ids, logs = (torch.cat([p[i] for p in parts]).cpu().numpy() for i in (0, 1))
        return ids, logs

    def _pay(self, old: np.ndarray) -> None:
        """Count the FLOPs of the base's log-probabilities that are drawn for the first time."""
        if not self.unpaid:
            return
        fresh = {row.tobytes() for row in self.memory.tokens_NS[old]} & self.unpaid
        self.unpaid -= fresh
        flops = float(self.meter.forward * len(fresh) * (self.width - 1))
        self.meter.spend("stored", flops)
        self.credit -= flops

    def _expected_pay(self, steps: int) -> float:
        """FLOPs that `_pay` is going to count over so many steps, on average."""
        held = self.unpaid & {row.tobytes() for row in self.memory.tokens_NS}  # what is not stored is not drawn
        if not held:
            return 0.0
        missed = (1.0 - 1.0 / len(self.memory)) ** (steps * self.size * self.replay)
        return float(self.meter.forward * len(held) * (1.0 - missed) * (self.width - 1))

    def _outer_step(self) -> None:
        with torch.no_grad():
            for outer, parameter in zip(self.outer, self.model.parameters(), strict=True):
                outer.lerp_(parameter, self.method.reptile)
                parameter.copy_(outer)

    def _weigh(self, segment: Segment) -> None:
        """Measure what each weight is worth to a segment (EWC)."""
        assert self.elastic is not None
        chosen = np.linspace(0, len(segment.tokens_NS) - 1, FISHER_SEQUENCES).astype(int)
        tokens = self.elastic.boundary([torch.from_numpy(segment.tokens_NS[i]).to(self.device) for i in chosen])
        self.meter.spend("fisher", tokens * self.meter.full)
        self.credit -= tokens * self.meter.full

    def _boundary(self, segment: Segment) -> None:
        method = self.method
        if self.elastic is not None and segment is not self.material.segments[-1]:
            self._weigh(segment)
        for adapter in self.adapters:
            adapter.merge()
            adapter.restart(self.generator)
        if self.adapters:
            self.optimizer = self._optimizer()
        if self.boundary is not None:
            with torch.no_grad():
                for old, parameter in zip(self.boundary.parameters(), self.model.parameters(), strict=True):
                    parameter.lerp_(old, method.merge)
            self.boundary = frozen_copy(self.model)
        if self.method.lwf:
            self.teacher = frozen_copy(self.model)
        scored = self.average.average if self.average is not None else self.model
        self.trace.score(scored, self.position)  # type: ignore[arg-type]


def learning_rate_of(trainer: PlainTrainer, step: int, steps: int) -> float:
    """Step size by the method's schedule."""
    if trainer.method.schedule == "rewarm":
        return learning_rate(trainer.lr, step, steps)
    return trainer.lr * min(1.0, (trainer.steps_done + 1) / WARM_STEPS)


def _fitting_top(method: Method, capacity: float, batch: int) -> int:
    """Log-probabilities per token, halved until a batch of so many tokens fits into the bytes, or one is left."""
    top = method.der_top
    while top > 1 and batch * (1 + TOP_BYTES * top) > capacity:
        top //= 2
    return top


def _new_counts(steps: int, size: int, replay: float) -> np.ndarray:
    """New sequences of each step (steps,): exact over time for any share."""
    old = np.floor(np.arange(1, steps + 1) * size * replay + 1e-9) - np.floor(np.arange(steps) * size * replay + 1e-9)
    return (size - old).astype(int)


def _visits(first: int, last: int, counts: np.ndarray) -> List[List[int]]:
    """Places of the new sequences of each step over rows first to last - 1: in order, evenly, again and again."""
    total, rows = int(counts.sum()), last - first
    again = np.arange(total) % rows
    places = first + (again if total >= rows else np.arange(total) * rows // max(1, total))
    return [list(map(int, part)) for part in np.split(places, np.cumsum(counts)[:-1])] if len(counts) else []


class JointTrainer(PlainTrainer):
    """All text of base and stream at once, in random order: what a learner without a stream would reach."""

    def _recall(self, capacity: float) -> Optional[Recall]:
        return None

    def run(self) -> Trace:
        """Train once over everything; returns the trial's trace."""
        material = self.material
        parts = [material.base, *material.segments] if material.has_base else material.segments
        tokens_NS = np.concatenate([s.tokens_NS for s in parts])
        self.trace.score(self.model, 0)
        steps = int(self.epochs * self.meter.full * material.stream_tokens // self.step_flops)
        passes = range(1 + steps * self.size // len(tokens_NS))
        order = np.concatenate([np.random.default_rng([self.seed, e]).permutation(len(tokens_NS)) for e in passes])
        whole = Segment("all", tokens_NS, np.zeros(len(tokens_NS), int), np.zeros(len(tokens_NS), int))
        for step in range(steps):
            places = list(map(int, order[step * self.size : (step + 1) * self.size]))
            batch = Batch(torch.from_numpy(tokens_NS[places]).to(self.device), len(places), places, np.empty(0, int))
            self._step(batch, whole, learning_rate(self.lr, step, steps))
        self.trace.online.clear()
        self.trace.holds(material.stream_bytes)
        self.trace.score(self.model, material.stream_tokens)
        self.trace.learner_flops = self.trace.inline_flops = self.meter.total
        return self.trace
