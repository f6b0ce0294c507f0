"""The awake phase: score, log, then learn. One forward pass serves both the score and the gradient.

Shapes: B sequences in a batch, S stored tokens, T = S - 1 predicted ones, K lengths of context that recall looks up.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from nl_model.clock import LevelClock
from nl_model.config import ordered_levels
from nl_model.losses import token_nll
from nl_model.model import NestedLM, autocast
from nl_model.online import OnlineLevels
from nl_model.recall import Recall
from nl_model.weights import join, load_into, split
from pipelines.config.schema import Config
from pipelines.data.stream import Sequence as StreamSequence
from pipelines.experience import Record
from pipelines.wake.online_training import OnlineTraining
from pipelines.wake.report import StepReport
from pipelines.wake.writes import held_parameters, wake_flops

Log = Callable[[List[Record]], Callable[[], None]]
"""Starts to make records durable; the function it returns waits until they are."""


class Awake:
    """The model as the online learner holds it: slow levels at rest, fast levels being written.

    Written weights are `u + offset`: u moves by the learner's own gradients, offset by adoptions only
    (docs/ARCHITECTURE.md, rebasing).

    Args:
        recall: read beside the model where there is one. No gradient, surprise or decision comes from it.
        training: trains every level, where wake.writes=all.
    """

    def __init__(
        self,
        model: NestedLM,
        cfg: Config,
        recall: Optional[Recall] = None,
        training: Optional[OnlineTraining] = None,
    ) -> None:
        self.model, self.cfg, self.training = model, cfg, training
        self.device, self.precision = next(model.parameters()).device, cfg.compute.precision
        own = [n for n in ordered_levels(cfg.levels) if cfg.levels[n].owner == "learner"]
        self.levels = OnlineLevels(model, own) if training is None else None
        """The learner's own levels, and their clock also where nothing is written."""
        self.writes = cfg.wake.writes
        if self.writes == "none":
            model.requires_grad_(False)
        self.read = torch.compile(_read) if cfg.compute.compile else _read
        self.recall = recall
        self.rest = held_parameters(model, cfg)
        """Written weights as the release has them at rest."""
        self.offset: Dict[str, Tensor] = {n: torch.zeros_like(p) for n, p in self.rest.items()}
        self.flops = wake_flops(cfg, model.vocab_size)
        """Per token of a step that writes as configured (of writes=all: `OnlineTraining.flops`)."""
        self.release, self._tokens = 0, 0

    def step(self, batch: Sequence[StreamSequence], log: Log) -> StepReport:
        """Score the batch, start logging it, take its gradient, and write what is due once it is durable.

        Raises whatever `log` raises; no weight has changed then, but recall has read the batch: go on from a state.
        """
        start = time.perf_counter()
        tokens_BS = np.stack([s.tokens for s in batch]).astype(np.int64)
        sequences_BS = torch.from_numpy(tokens_BS).to(self.device)
        scored = _Scored(self, batch, tokens_BS, log)
        if self.training is not None:
            flops = self.training.step(sequences_BS, np.array([s.key for s in batch]), scored.note, scored.wait)
            written = tuple(self.cfg.levels)
        else:
            flops, written = self.flops * sequences_BS[:, 1:].numel(), self._step_levels(sequences_BS, scored)
        self._tokens += sequences_BS[:, 1:].numel()
        return scored.report(self._tokens, time.perf_counter() - start, written, float(flops))

    def _step_levels(self, sequences_BS: Tensor, scored: _Scored) -> Tuple[str, ...]:
        """Score, and write those of the learner's own levels that are due."""
        assert self.levels is not None
        writes = self.writes == "fast"
        with autocast(self.device, self.precision), torch.set_grad_enabled(writes):
            logits_BTV, nll_BT = self.read(self.model, sequences_BS)
        finite_B = scored.note(logits_BTV, nll_BT)
        if writes and finite_B.any():
            if not finite_B.all():
                # A zero gradient into a row that is not finite comes out of its backward pass as NaN for everyone.
                with autocast(self.device, self.precision):
                    _, nll_BT = self.read(self.model, sequences_BS[finite_B.to(self.device)])
            self.levels.observe(nll_BT)
        scored.wait()
        written = self.levels.advance(sequences_BS[:, 1:].numel()) if writes else ()
        if self.cfg.wake.decay and written:
            self._decay(written)
        return written

    @torch.no_grad()
    def _decay(self, written: Sequence[str]) -> None:
        """Take back a share of what the written levels differ from their rest by: what is not confirmed fades."""
        for level in written:
            for name, parameter in self.model.parameters_of(level).items():
                parameter.lerp_(self.rest[name], self.cfg.wake.decay)

    @property
    def tokens(self) -> int:
        """Stream position."""
        return self._tokens

    @property
    def clock(self) -> LevelClock:
        """Of what is written; a learner that trains everything writes at every step."""
        if self.levels is not None:
            return self.levels.clock
        return LevelClock({"all": self.cfg.wake.batch * self.cfg.model.context})

    @property
    def on_boundary(self) -> bool:
        """Whether a release may be adopted here: no level is in the middle of its period."""
        return self.training is not None or self.clock.on_boundary(self.tokens)

    @property
    def writes_done(self) -> int:
        """Writes of the fastest level so far."""
        if self.training is not None:
            return self.training.steps
        assert self.levels is not None
        return next(iter(self.levels.optimizers.writes.values()))

    def records(self, batch: Sequence[StreamSequence], surprise_B: Tensor) -> List[Record]:
        """A batch as experiences."""
        return [
            Record(
                key=s.key,
                source=s.source,
                document=s.document,
                offset=s.offset,
                subject=s.subject,
                kind="real" if math.isfinite(value) else "quarantined",
                surprise=value,
                fast_step=self.writes_done,
                release=self.release,
                tokens=s.tokens,
            )
            for s, value in zip(batch, surprise_B.tolist(), strict=True)
        ]

    def adopt(self, release: int, weights: Mapping[str, Tensor], offset: Mapping[str, Tensor]) -> float:
        """Take over a release and rebase what the learner writes; returns the norm of its shift.

        Args:
            release: its number.
            weights: of all parameters by name.
            offset: the release's new offset of the written parameters by name.
        """
        own = dict(self.model.named_parameters())
        shift = {name: offset[name].to(self.device) - self.offset[name] for name in self.offset}
        load_into(self.model, {name: tensor for name, tensor in weights.items() if name not in self.offset})
        self.rest = {name: weights[name].to(self.device).clone() for name in self.offset}
        with torch.no_grad():
            for name, delta in shift.items():
                own[name].add_(delta)
                self.offset[name] = offset[name].to(self.device).clone()
        if self.training is not None:
            self.training.shift(shift)
        elif self.levels is not None and self.levels.starts is not None:
            self.levels.starts.shift(shift)
        self.release = release
        return float(torch.stack([delta.double().norm() for delta in shift.values()]).norm())

    def served(self) -> Dict[str, Tensor]:
        """The written weights that would answer now: as they stand, or their average where the learner trains all."""
        if self.training is not None and self.training.average is not None:
            return {name: tensor.to(self.device) for name, tensor in self.training.average.weights.items()}
        return held_parameters(self.model, self.cfg)

    def unshifted(self) -> Dict[str, Tensor]:
        """`u`: what is served without the shifts of adoptions; what a mark pins."""
        return {name: value - self.offset[name] for name, value in self.served().items()}

    def state(self) -> Tuple[Dict[str, Tensor], Dict[str, int]]:
        """Everything but what rests: (tensors, counters). Exact to the bit, also in the middle of a period."""
        tensors = join(weight=held_parameters(self.model, self.cfg), offset=self.offset)
        if self.training is not None:
            tensors.update(self.training.state())
        elif self.levels is not None:
            tensors.update(self.levels.optimizers.state())
            if self.levels.starts is not None:
                tensors.update(self.levels.starts.state())
        if self.recall is not None:
            tensors.update(self.recall.state())
        return tensors, {"tokens": self.tokens, "release": self.release}

    def load_state(self, tensors: Dict[str, Tensor], counters: Dict[str, int]) -> None:
        """Take over what `state` returned; the weights of its release must be loaded already."""
        load_into(self.model, split(tensors, "weight"))
        offset = split(tensors, "offset")
        for name in self.offset:
            self.offset[name] = offset[name].to(self.device)
        if self.training is not None:
            self.training.load_state(tensors)
        elif self.levels is not None:
            self.levels.optimizers.load_state(tensors)
            if self.levels.starts is not None:
                self.levels.starts.load_state(tensors)
            self.levels.tokens = int(counters["tokens"])
        if self.recall is not None:
            self.recall.load_state(tensors)
        self._tokens, self.release = int(counters["tokens"]), int(counters["release"])


class _Scored:
    """A batch on its way: scored, being logged, durable."""

    def __init__(self, awake: Awake, batch: Sequence[StreamSequence], tokens_BS: np.ndarray, log: Log) -> None:
        self.awake, self.batch, self.tokens_BS, self.log = awake, batch, tokens_BS, log
        self.surprise_B = torch.empty(0)
        self.recalled_B: Optional[Tensor] = None
        self.waited = 0.0
        self._wait: Optional[Callable[[], None]] = None

    def note(self, logits_BTV: Tensor, nll_BT: Tensor) -> Tensor:
        """Start logging the batch with what the model made of it; returns which sequences may be learned from (B,)."""
        recall = self.awake.recall
        if recall is not None:
            self.recalled_B = torch.from_numpy(recall.read(self.tokens_BS, logits_BTV, nll_BT).mean(1))
        self.surprise_B = nll_BT.detach().mean(1).cpu()
        self._wait = self.log(self.awake.records(self.batch, self.surprise_B))
        return torch.isfinite(self.surprise_B)

    def wait(self) -> None:
        """Return once the batch is durable; nothing may be written before."""
        if self._wait is not None:
            start, wait, self._wait = time.perf_counter(), self._wait, None
            wait()
            self.waited += time.perf_counter() - start

    def report(self, tokens: int, seconds: float, written: Tuple[str, ...], flops: float) -> StepReport:
        """What the step saw and did."""
        predicted, finite_B = self.tokens_BS.shape[1] - 1, torch.isfinite(self.surprise_B).tolist()
        bpb, surprise, sizes = _by_source(self.batch, self.surprise_B.double(), predicted)
        recalled: Dict[str, float] = {}
        if self.recalled_B is not None:
            recalled = _by_source(self.batch, self.recalled_B, predicted)[0]
        bad = [s for s, ok in zip(self.batch, finite_B, strict=True) if not ok]
        return StepReport(
            tokens=tokens,
            seconds=seconds,
            waited=self.waited,
            bpb=bpb,
            surprise=surprise,
            recalled=recalled,
            bytes=sizes,
            written=written,
            quarantined=tuple((s.key, s.source, "loss is not finite") for s in bad),
            flops=flops,
        )


def _read(model: NestedLM, sequences_BS: Tensor) -> Tuple[Tensor, Tensor]:
    """Logits (B, T, V) and loss (B, T) of sequences."""
    logits_BTV = model(sequences_BS[:, :-1])
    return logits_BTV, token_nll(logits_BTV, sequences_BS[:, 1:])


def _by_source(
    batch: Sequence[StreamSequence], surprise_B: Tensor, predicted: int
) -> Tuple[Dict[str, float], Dict[str, float], Dict[str, int]]:
    """Bits per byte and nats per token of each source in a batch, and its bytes."""
    nats: Dict[str, float] = defaultdict(float)
    bytes_: Dict[str, int] = defaultdict(int)
    count: Dict[str, int] = defaultdict(int)
    for sequence, value in zip(batch, surprise_B.tolist(), strict=True):
        if math.isfinite(value):
            nats[sequence.source] += value * predicted
            bytes_[sequence.source] += sequence.bytes
            count[sequence.source] += predicted
    bpb = {source: nats[source] / math.log(2) / max(1, bytes_[source]) for source in nats}
    return bpb, {source: nats[source] / count[source] for source in nats}, dict(bytes_)
