"""The awake phase: score, log, then learn. One forward pass serves both the score and the gradient.

Shapes: B sequences in a batch, T predicted tokens per sequence, K lengths of context that recall looks up.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from nl_model.config import ordered_levels
from nl_model.losses import token_nll
from nl_model.model import NestedLM, autocast
from nl_model.online import OnlineLevels
from nl_model.recall import Recall
from nl_model.weights import load_into, parameters_of
from pipelines.config.schema import ComputeConfig
from pipelines.data.stream import Sequence as StreamSequence
from pipelines.experience import Record

Log = Callable[[List[Record]], Callable[[], None]]
"""Starts to make records durable; the function it returns waits until they are."""


@dataclass(frozen=True)
class StepReport:
    """What one wake step saw and did."""

    tokens: int
    """Stream position after the step, in tokens."""
    seconds: float
    """Wall time of the step."""
    waited: float
    """Of these, seconds spent waiting for the experience to be durable."""
    bpb: Dict[str, float]
    """Online loss per source in bits per byte, measured before learning."""
    surprise: Dict[str, float]
    """The same in nats per token."""
    recalled: Dict[str, float]
    """Online loss per source in bits per byte when the model is read together with recall; empty without recall."""
    bytes: Dict[str, int]
    """Bytes per source that these losses are of."""
    written: Tuple[str, ...]
    """Levels written at the end of the step."""
    quarantined: Tuple[Tuple[int, str, str], ...]
    """(key, source, reason) of sequences that were not learned from."""


class Awake:
    """The model as the online learner holds it: slow levels at rest, fast levels being written.

    Fast weights are `u + offset`: u moves by the learner's own gradients, offset by adoptions only
    (docs/ARCHITECTURE.md, rebasing).

    Args:
        recall: read beside the model where there is one. No gradient, surprise or decision comes from it.
    """

    def __init__(self, model: NestedLM, compute: ComputeConfig, recall: Optional[Recall] = None) -> None:
        levels = model.level_configs
        names = [n for n in ordered_levels(levels) if levels[n].owner == "learner"]
        self.model = model
        self.device = next(model.parameters()).device
        self.precision = compute.precision
        self.levels = OnlineLevels(model, names)
        self.read = torch.compile(_read) if compute.compile else _read
        self.recall = recall
        self.offset: Dict[str, Tensor] = {n: torch.zeros_like(p) for n, p in parameters_of(model, "learner").items()}
        self.release = 0

    def step(self, batch: Sequence[StreamSequence], log: Log) -> StepReport:
        """Score the batch, start logging it, take its gradient, and write the levels that are due once it is durable.

        Raises whatever `log` raises; no weight has changed then, but recall has heard the batch: go on from a state.
        """
        start = time.perf_counter()
        tokens_BS = np.stack([s.tokens for s in batch]).astype(np.int64)
        sequences_BS = torch.from_numpy(tokens_BS).to(self.device)
        nll_BT, recalled_B = self._score(tokens_BS, sequences_BS)
        surprise_B = nll_BT.detach().mean(1).cpu()
        wait_until_durable = log(self._records(batch, surprise_B))

        finite = torch.isfinite(surprise_B)
        quarantined = tuple(
            (s.key, s.source, "loss is not finite") for s, ok in zip(batch, finite, strict=True) if not ok
        )
        if finite.any():
            if not finite.all():
                # A zero gradient into a row that is not finite comes out of its backward pass as NaN for everyone.
                with autocast(self.device, self.precision):
                    _, nll_BT = self.read(self.model, sequences_BS[finite.to(self.device)])
            self.levels.observe(nll_BT)
        waited = -time.perf_counter()
        wait_until_durable()
        waited += time.perf_counter()
        written = self.levels.advance(sequences_BS[:, 1:].numel())
        bpb, surprise, sizes = _by_source(batch, surprise_B.double(), nll_BT.size(1))
        recalled = {} if recalled_B is None else _by_source(batch, recalled_B, nll_BT.size(1))[0]
        seconds = time.perf_counter() - start
        return StepReport(self.tokens, seconds, waited, bpb, surprise, recalled, sizes, written, quarantined)

    def _score(self, tokens_BS: np.ndarray, sequences_BS: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """The model's loss (B, T) with its graph; and the mean loss of each sequence read together with recall (B,)."""
        with autocast(self.device, self.precision):
            logits_BTV, nll_BT = self.read(self.model, sequences_BS)
        if self.recall is None:
            return nll_BT, None
        return nll_BT, torch.from_numpy(self.recall.read(tokens_BS, logits_BTV, nll_BT).mean(1))

    @property
    def tokens(self) -> int:
        """Stream position."""
        return self.levels.tokens

    def _records(self, batch: Sequence[StreamSequence], surprise_B: Tensor) -> List[Record]:
        fast_step = next(iter(self.levels.optimizers.writes.values()))
        return [
            Record(
                key=s.key,
                source=s.source,
                document=s.document,
                offset=s.offset,
                subject=s.subject,
                kind="real" if math.isfinite(value) else "quarantined",
                surprise=value,
                fast_step=fast_step,
                release=self.release,
                tokens=s.tokens,
            )
            for s, value in zip(batch, surprise_B.tolist(), strict=True)
        ]

    def adopt(self, release: int, slow: Dict[str, Tensor], offset: Dict[str, Tensor]) -> float:
        """Take over a release and rebase the fast levels; returns the norm of their shift.

        Args:
            release: its number.
            slow: weights of the pool's levels by parameter name.
            offset: the release's new offset of the learner's levels by parameter name.
        """
        fast = dict(self.model.named_parameters())
        shift = {name: offset[name].to(self.device) - self.offset[name] for name in self.offset}
        load_into(self.model, slow)
        with torch.no_grad():
            for name, delta in shift.items():
                fast[name].add_(delta)
                self.offset[name] = offset[name].to(self.device).clone()
        if self.levels.starts is not None:
            self.levels.starts.shift(shift)
        self.release = release
        return float(torch.stack([delta.double().norm() for delta in shift.values()]).norm())

    def unshifted(self) -> Dict[str, Tensor]:
        """`u`: the fast weights without the shifts of adoptions; what a round pins."""
        return {name: value - self.offset[name] for name, value in parameters_of(self.model, "learner").items()}

    def state(self) -> Tuple[Dict[str, Tensor], Dict[str, int]]:
        """Everything but the slow weights: (tensors, counters). Exact to the bit, also in the middle of a period."""
        tensors = {f"weight/{n}": t for n, t in parameters_of(self.model, "learner").items()}
        tensors.update({f"offset/{n}": t for n, t in self.offset.items()})
        tensors.update(self.levels.optimizers.state())
        if self.levels.starts is not None:
            tensors.update(self.levels.starts.state())
        if self.recall is not None:
            tensors.update(self.recall.state())
        return tensors, {"tokens": self.tokens, "release": self.release}

    def load_state(self, tensors: Dict[str, Tensor], counters: Dict[str, int]) -> None:
        """Take over what `state` returned; the slow weights of its release must be loaded already."""
        load_into(self.model, {k.removeprefix("weight/"): t for k, t in tensors.items() if k.startswith("weight/")})
        for name in self.offset:
            self.offset[name] = tensors[f"offset/{name}"].to(self.device)
        self.levels.optimizers.load_state(tensors)
        if self.levels.starts is not None:
            self.levels.starts.load_state(tensors)
        if self.recall is not None:
            self.recall.load_state(tensors)
        self.levels.tokens, self.release = int(counters["tokens"]), int(counters["release"])


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
