"""The learner: reads the stream once, in order, logs it, learns from it, pins marks and adopts releases.

It knows nothing of actors and files: `LearnerHost` keeps what must be kept. The actor of a run
(cluster/actors/learner.py) and the simulated run drive the same object.
"""

from __future__ import annotations

import json
import math
import time
from typing import Any, Callable, Dict, List, Optional, Protocol, Tuple

import numpy as np
from torch import Tensor

from nl_model.model import NestedLM, resolve_device
from nl_model.recall import ROWS, Recall
from nl_model.weights import load_into
from pipelines.config.schema import Config
from pipelines.data.module import DataModule
from pipelines.data.stream import Cursor
from pipelines.experience import DREAM_KEY, Record
from pipelines.experience.replay import Experience
from pipelines.wake.awake import Awake
from pipelines.wake.hooks import Hook
from pipelines.wake.looks import Looks
from pipelines.wake.online_training import OnlineTraining
from pipelines.wake.report import PINNED, Adoption, LearnerReport, Look, Mark, StepReport
from pipelines.wake.trigger import Cause, Trigger, relative_distance
from pipelines.wake.writes import held_parameters

KEPT_MARKS = 8
"""Newest marks that a checkpoint remembers: whoever starts rounds may have died before it wrote them down."""
RECALL_TOKENS = 1 << 24
"""Most tokens of the store that recall reads at a start; about a million a second."""
Checkpoint = Tuple[Dict[str, Tensor], Dict[str, Any]]
"""Tensors, and what is not one, JSON-able."""


class LearnerHost(Protocol):
    """What keeps a learner's things: files and a service in a run, memory in a simulated one."""

    def append(self, records: List[Record], cursor: Dict[str, Any]) -> Callable[[], int]:
        """Start to make records durable with the cursor behind them; the function waits and gives the store's
        version."""

    def experience(self) -> Experience:
        """The newest version of the store, whole."""

    def pin(self, file: str, tensors: Dict[str, Tensor]) -> None:
        """Keep what a mark pins under a name. What is there already stays: a round may read it by now."""

    def release(self, number: int) -> Tuple[Dict[str, Tensor], Dict[str, Tensor]]:
        """(weights, offsets) of a published release by parameter name."""

    def save(self, tokens: int, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint, durably."""

    def newest(self) -> Optional[Checkpoint]:
        """The newest checkpoint."""


class Learner:
    """Awake phase. Calls run one after the other; `stopping` alone may be set meanwhile.

    Args:
        hook: what is added to training, where the learner trains every level.
    """

    def __init__(self, cfg: Config, data: DataModule, host: LearnerHost, hook: Optional[Hook] = None) -> None:
        self.cfg, self.data, self.host, self.hook = cfg, data, host, hook
        self.period = cfg.pool_period
        self.looks = Looks(cfg, data) if cfg.report.look_every else None
        self.stopping = False

    def restore(self) -> LearnerReport:
        """Begin at the newest checkpoint, or at the base, and forget everything since; the stream is replayed."""
        cfg, found = self.cfg, self.host.newest()
        tensors, meta = found if found is not None else ({}, {"release": 0})
        device = resolve_device(cfg.compute.device)
        model = NestedLM(cfg.model, cfg.levels, self.data.tokenizer.vocab_size).to(device)
        weights, _ = self.host.release(int(meta["release"]))
        load_into(model, weights)
        recall = Recall(cfg.wake.recall) if cfg.wake.recall else None
        trains_all = cfg.wake.writes == "all"
        training = OnlineTraining(model, cfg, self.host.experience, self.hook) if trains_all else None
        self.awake = Awake(model, cfg, recall, training)
        self.trigger = Trigger(cfg.when, self.period, self.awake.clock)
        if found is not None:
            self.awake.load_state(tensors, {key: int(meta[key]) for key in ("tokens", "release")})
            self.trigger.load_state(meta["trigger"])
        self.version, self.last_key = int(meta.get("version", 0)), int(meta.get("last_key", -1))
        self.marks = [Mark(**mark) for mark in meta.get("marks", [])]
        self.spans: Dict[str, Tuple[int, int]] = {s: (a, b) for s, (a, b) in meta.get("spans", {}).items()}
        if recall is not None and recall.is_empty:
            self._fill_recall(recall)
        self.stream = self.data.stream(Cursor.from_json(meta["cursor"]) if found is not None else None)
        self.steps_since_checkpoint = 0
        self.pending: List[Tuple[int, int]] = []
        self.last_end = time.perf_counter()
        return self._report(marks=tuple(self.marks))

    def _fill_recall(self, recall: Recall) -> None:
        """Let recall read what the store holds up to the last key, the base first.

        For a start without a checkpoint, or with one whose recall is none or another: then no more than `RECALL_TOKENS`
        tokens.
        """
        store = self.host.experience()
        rows = np.flatnonzero((store.keys <= self.last_key) & (store.keys < DREAM_KEY))
        rows = rows[-RECALL_TOKENS // self.cfg.model.context :]
        for first in range(0, len(rows), ROWS):
            recall.remember(store.tokens(rows[first : first + ROWS]).astype(np.int64))

    def advance(self, max_steps: int, until: Optional[int] = None) -> LearnerReport:
        """Take up to `max_steps` wake steps; returns early where a round is due, at `until` tokens and at the end."""
        steps: List[StepReport] = []
        marks: List[Mark] = []
        adopted: List[Adoption] = []
        looks: List[Look] = []
        ended = False
        while len(steps) < max_steps and not self.stopping and not marks:
            if until is not None and self.awake.tokens >= until:
                break
            adopted += self._adopt_pending()
            asked, before = time.monotonic(), self.awake.tokens
            batch = self.stream.next_batch(self.cfg.wake.batch)
            if not batch:
                ended = True
                break
            cause = self.trigger.before_step(before, time.monotonic() - asked)
            marks += self._mark_on_the_way(cause)
            steps.append(self.awake.step(batch, self._log))
            self.last_key = batch[-1].key
            self._span(batch, before)
            self.steps_since_checkpoint += 1
            looks += self._look(before)
            cause = self.trigger.after_step(before, self.awake.tokens, _loss(steps[-1]), self._distance)
            marks += self._mark_on_the_way(cause)
            if self.steps_since_checkpoint >= self.cfg.wake.checkpoint_every:
                self.checkpoint()
        if self.stopping:
            self.checkpoint()
        return self._report(tuple(steps), tuple(marks), tuple(adopted), tuple(looks), ended)

    def finish(self) -> LearnerReport:
        """After the end of the stream: pin what came since the last boundary."""
        mark = self._mark(Cause("idle", "the stream has ended", {}))
        self.checkpoint()
        return self._report(marks=(mark,), ended=True)

    def adopt(self, release: int, not_before: int = 0, at_once: bool = False) -> LearnerReport:
        """Adopt a release at the next common boundary of the learner's levels that is not before a stream position.

        Args:
            at_once: do not wait for a boundary (the stream has ended); then the served model is looked at.
        """
        self.pending.append((release, not_before))
        adopted = self._adopt_pending(at_once)
        looks = self._look(-1) if at_once and adopted else []
        return self._report(adopted=tuple(adopted), looks=tuple(looks), ended=at_once)

    def checkpoint(self) -> None:
        """Keep everything a resume needs."""
        tensors, counters = self.awake.state()
        meta = {
            **counters,
            "cursor": self.stream.cursor.to_json(),
            "version": self.version,
            "last_key": self.last_key,
            "trigger": self.trigger.state(),
            "marks": [vars(mark) for mark in self.marks],
            "spans": {source: list(span) for source, span in self.spans.items()},
        }
        self.host.save(self.awake.tokens, (tensors, meta))
        self.steps_since_checkpoint = 0

    def _adopt_pending(self, at_once: bool = False) -> List[Adoption]:
        tokens = self.awake.tokens
        ready = [release for release, not_before in self.pending if tokens >= not_before or at_once]
        if not ready or not (at_once or self.awake.on_boundary):
            return []
        newest = max(ready)
        self.pending = [(release, at) for release, at in self.pending if release > newest]
        if newest <= self.awake.release:
            return []
        weights, offset = self.host.release(newest)
        shift = self.awake.adopt(newest, weights, offset)
        self.checkpoint()  # a replay never has to repeat an adoption
        return [Adoption(newest, tokens, shift)]

    def _distance(self) -> float:
        """How far the written weights have moved from their rest state, relative to its norm."""
        return relative_distance(held_parameters(self.awake.model, self.cfg), self.awake.rest)

    def _span(self, batch: List[Any], before: int) -> None:
        context = self.cfg.model.context
        for i, sequence in enumerate(batch):
            first, _ = self.spans.get(sequence.source, (before, 0))
            self.spans[sequence.source] = (first, before + (i + 1) * context)

    def _look(self, before: int) -> List[Look]:
        """A look where one is due; `before`: the position before the step, negative: it is due now, the last one."""
        every, now = self.cfg.report.look_every, self.awake.tokens
        if self.looks is None or (before >= 0 and now // every == before // every):
            return []
        return [self.looks.look(self.awake, list(self.spans), before < 0)]

    def _mark_on_the_way(self, cause: Optional[Cause]) -> List[Mark]:
        """A mark where a round is due, behind which the learner goes on."""
        if cause is None:
            return []
        mark = self._mark(cause)
        if self.awake.training is not None:
            self.awake.training.boundary()
        return [mark]

    def _mark(self, cause: Cause) -> Mark:
        """What is written once stays: a round may read it by now, and an adoption since then rounds it otherwise."""
        file = f"checkpoints/{PINNED}{self.awake.tokens:015d}-{self.awake.release}.safetensors"
        self.host.pin(file, self.awake.unshifted())
        mark = Mark(self.awake.tokens, self.version, self.last_key, file, cause.to_json())
        self.marks = [*self.marks, mark][-KEPT_MARKS:]
        return mark

    def _log(self, records: List[Record]) -> Callable[[], None]:
        wait = self.host.append(records, self.stream.cursor.to_json())

        def wait_until_durable() -> None:
            self.version = wait()

        return wait_until_durable

    def _report(
        self,
        steps: Tuple[StepReport, ...] = (),
        marks: Tuple[Mark, ...] = (),
        adopted: Tuple[Adoption, ...] = (),
        looks: Tuple[Look, ...] = (),
        ended: bool = False,
    ) -> LearnerReport:
        now = time.perf_counter()
        seconds, self.last_end = now - self.last_end, now
        return LearnerReport(
            tokens=self.awake.tokens,
            release=self.awake.release,
            cursor=json.loads(json.dumps(self.stream.cursor.to_json())),
            steps=steps,
            seconds=seconds,
            marks=marks,
            adopted=adopted,
            looks=looks,
            spans=dict(self.spans),
            quarantined=tuple((q.source, q.origin, q.reason) for q in self.data.corpus.quarantined),
            ended=ended,
            stopped=self.stopping,
        )


def _loss(step: StepReport) -> float:
    """Online loss of a step in nats per token; not finite where every sequence was quarantined."""
    values = list(step.surprise.values())
    return sum(values) / len(values) if values else math.nan
