"""Actor `OnlineLearner`: reads the stream once, in order, and writes only the fast levels. The pool never delays it."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import ray

from cluster.actors.start import configure_torch
from cluster.driver.state import PINNED
from cluster.storage.releases import Releases, load_release, split
from nl_model.model import NestedLM, resolve_device
from nl_model.recall import ROWS, Recall
from nl_model.weights import load_into, load_tensors, parameters_of, save_tensors
from pipelines.config.schema import Config
from pipelines.data.module import open_setting
from pipelines.data.stream import Cursor
from pipelines.experience import DREAM_KEY, Record, Snapshot
from pipelines.wake.awake import Awake
from pipelines.wake.report import Adoption, LearnerReport, Mark, StepReport
from pipelines.wake.trigger import Cause, Trigger, relative_distance

KEPT_CHECKPOINTS = 2
KEPT_MARKS = 4
"""Marks that a checkpoint remembers: more than calls can be in flight."""
HEARD = 1 << 24
"""Most tokens of the store that recall hears at a start; about a million a second."""


@dataclass
class Draft:
    """A report while it is being made."""

    steps: List[StepReport] = field(default_factory=list)
    marks: List[Mark] = field(default_factory=list)
    adopted: List[Adoption] = field(default_factory=list)
    ended: bool = False


class OnlineLearner:
    """Awake phase as a process. Calls run one after the other; `stop` alone may overtake them."""

    def __init__(self, cfg: Config, run_dir: str, tokenizer_state: Dict[str, Any]) -> None:
        configure_torch(cfg)
        self.cfg, self.run_dir = cfg, Path(run_dir)
        self.setting = open_setting(cfg, tokenizer_state)
        self.releases = Releases(self.run_dir / "releases")
        self.checkpoints = self.run_dir / "checkpoints"
        self.period = min(level.period for level in cfg.levels.values() if level.owner == "pool")
        self.stopping = False

    def restore(self, service: Any) -> LearnerReport:
        """Begin at the newest checkpoint, or at the base, and forget everything since; the stream is replayed."""
        cfg = self.cfg
        model = NestedLM(cfg.model, cfg.levels, self.setting.tokenizer.vocab_size).to(
            resolve_device(cfg.compute.device)
        )
        found = sorted(self.checkpoints.glob("learner-*.safetensors"))
        tensors, meta = load_tensors(found[-1]) if found else ({}, {"release": 0})
        release = load_release(self.releases.directory(int(meta["release"])))
        load_into(model, split(release, "weight"))
        last_key = int(meta.get("last_key", -1))
        recall = Recall(cfg.wake.recall) if cfg.wake.recall else None
        self.awake = Awake(model, cfg.compute, recall)
        self.rest = parameters_of(model, "learner")
        self.trigger = Trigger(cfg.when, self.period, self.awake.levels.clock)
        if found:
            self.awake.load_state(tensors, meta)
        if recall is not None and recall.is_empty:
            self._hear(recall, last_key)
        if "trigger" in meta:
            self.trigger.load_state(meta["trigger"])
        cursor = Cursor.from_json(meta["cursor"]) if found else None
        self.stream = self.setting.stream(cursor)
        self.service = service
        self.version, self.last_key = int(meta.get("version", 0)), last_key
        self.steps_since_checkpoint = 0
        self.pending: List[Tuple[int, int]] = []
        self.last_end = time.perf_counter()
        self.spans: Dict[str, Tuple[int, int]] = {}
        self.marks = [Mark(**mark) for mark in meta.get("marks", [])]
        return self._report(Draft(marks=list(self.marks)))

    def _hear(self, recall: Recall, last_key: int) -> None:
        """Let recall hear what the store holds up to a key, the base first.

        For a start without a checkpoint, or with one whose recall is none or another: then no more than `HEARD` tokens.
        """
        snapshot = Snapshot.open(self.run_dir / "store")
        rows = snapshot.rows_between(-DREAM_KEY, last_key)[-HEARD // self.cfg.model.context :]
        for first in range(0, len(rows), ROWS):
            recall.remember(snapshot.tokens(rows[first : first + ROWS]))

    def advance(self, max_steps: int, until: Optional[int] = None) -> LearnerReport:
        """Take up to `max_steps` wake steps; returns early where a round is due, at `until` tokens and at the end."""
        report = Draft()
        while len(report.steps) < max_steps and not self.stopping and not report.marks:
            if until is not None and self.awake.tokens >= until:
                break
            report.adopted += self._adopt_pending()
            asked = time.monotonic()
            batch = self.stream.next_batch(self.cfg.wake.batch)
            if not batch:
                report.ended = True
                break
            before = self.awake.tokens
            cause = self.trigger.before_step(before, time.monotonic() - asked)
            report.marks += [self._mark(cause)] if cause is not None else []
            report.steps.append(StepReport(**asdict(self.awake.step(batch, self._log))))
            self._span(report.steps[-1])
            self.last_key = batch[-1].key
            self.steps_since_checkpoint += 1
            cause = self.trigger.after_step(before, self.awake.tokens, _loss(report.steps[-1]), self._distance)
            if cause is not None:
                report.marks.append(self._mark(cause))
            if self.steps_since_checkpoint >= self.cfg.wake.checkpoint_every:
                self.checkpoint()
        if self.stopping:
            self.checkpoint()
        return self._report(report)

    def finish(self) -> LearnerReport:
        """After the end of the stream: pin what came since the last boundary."""
        report = Draft(marks=[self._mark(Cause("idle", "the stream has ended", {}))], ended=True)
        self.checkpoint()
        return self._report(report)

    def adopt(self, release: int, not_before: int = 0, at_once: bool = False) -> LearnerReport:
        """Adopt a release at the next common boundary of the learner's levels that is not before a stream position.

        Args:
            at_once: do not wait for a boundary (the stream has ended).
        """
        self.pending.append((release, not_before))
        report = Draft()
        report.adopted += self._adopt_pending(at_once)
        return self._report(report)

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Make the running and all later calls of `advance` finish their step, checkpoint and return."""
        self.stopping = True

    def checkpoint(self) -> None:
        """Write everything a resume needs, durably; the newest two are kept."""
        tensors, counters = self.awake.state()
        meta = {**counters, "cursor": self.stream.cursor.to_json(), "version": self.version, "last_key": self.last_key}
        meta["trigger"], meta["marks"] = self.trigger.state(), [asdict(mark) for mark in self.marks]
        save_tensors(self.checkpoints / f"learner-{self.awake.tokens:015d}.safetensors", tensors, meta)
        for old in sorted(self.checkpoints.glob("learner-*.safetensors"))[:-KEPT_CHECKPOINTS]:
            old.unlink()
        self.steps_since_checkpoint = 0

    def _adopt_pending(self, at_once: bool = False) -> List[Adoption]:
        tokens = self.awake.tokens
        ready = [release for release, not_before in self.pending if tokens >= not_before or at_once]
        if not ready or not (at_once or self.awake.levels.clock.on_boundary(tokens)):
            return []
        newest = max(ready)
        self.pending = [(release, at) for release, at in self.pending if release > newest]
        if newest <= self.awake.release:
            return []
        tensors = load_release(self.releases.directory(newest))
        pool, weights = set(self.awake.model.owned_by("pool")), split(tensors, "weight")
        slow = {n: t for n, t in weights.items() if n in pool}
        self.rest = {name: weights[name] for name in self.rest}
        norm = self.awake.adopt(newest, slow, split(tensors, "offset"))
        self.checkpoint()  # a replay never has to repeat an adoption
        return [Adoption(newest, tokens, norm)]

    def _distance(self) -> float:
        """How far the fast weights have moved from their rest state, relative to its norm."""
        return relative_distance(parameters_of(self.awake.model, "learner"), self.rest)

    def _mark(self, cause: Cause) -> Mark:
        """What is written once stays: a round may read it by now, and an adoption since then rounds it otherwise."""
        file = f"checkpoints/{PINNED}{self.awake.tokens:015d}-{self.awake.release}.safetensors"
        if not (self.run_dir / file).exists():
            save_tensors(self.run_dir / file, self.awake.unshifted(), {"tokens": self.awake.tokens})
        mark = Mark(self.awake.tokens, self.version, self.last_key, file, cause.to_json())
        self.marks = [*(one for one in self.marks if one.tokens != mark.tokens), mark][-KEPT_MARKS:]
        return mark

    def _span(self, step: StepReport) -> None:
        for source in step.bpb:
            first = step.tokens - self.cfg.wake.batch * self.cfg.model.context
            self.spans[source] = (self.spans.get(source, (first, 0))[0], step.tokens)

    def _log(self, records: List[Record]) -> Callable[[], None]:
        reference = self.service.append.remote(records, self.stream.cursor.to_json())

        def wait_until_durable() -> None:
            self.version = ray.get(reference, timeout=self.cfg.failures.call_timeout)

        return wait_until_durable

    def _report(self, draft: Draft) -> LearnerReport:
        now = time.perf_counter()
        seconds, self.last_end = now - self.last_end, now
        return LearnerReport(
            tokens=self.awake.tokens,
            release=self.awake.release,
            cursor=json.loads(json.dumps(self.stream.cursor.to_json())),
            steps=tuple(draft.steps),
            seconds=seconds,
            marks=tuple(draft.marks),
            adopted=tuple(draft.adopted),
            spans=dict(self.spans),
            quarantined=tuple((q.source, q.origin, q.reason) for q in self.setting.corpus.quarantined),
            ended=draft.ended,
            stopped=self.stopping,
        )


def _loss(step: StepReport) -> float:
    """Online loss of a step in nats per token; not finite where every sequence was quarantined."""
    values = list(step.surprise.values())
    return sum(values) / len(values) if values else math.nan
