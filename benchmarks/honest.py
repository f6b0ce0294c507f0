"""A run without processes whose candidates are judged as files: its learner, its rounds, and releases on disk.

The gate's benchmark needs candidates that nothing is wrong with, and has to spoil them before they are judged. So who
asks for what, in which order, stands here; what reads, trains, measures and decides is what a run executes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Tuple

from torch import Tensor

from cluster.pool.evidence import candidate_identity, gather_storage
from cluster.storage.releases import (
    Release,
    Releases,
    Shard,
    inspect_shard,
    load_release,
    shards_fingerprint,
    write_shard,
)
from nl_model.weights import join, load_into, split
from pipelines.config.schema import Config
from pipelines.data.module import open_data
from pipelines.experience.memory import MemoryStore
from pipelines.gate.decision import Decision, decide
from pipelines.gate.judge import Judge, gather_evidence
from pipelines.gate.probe import score
from pipelines.machine.local import LocalHost, MemoryHost, pretrain
from pipelines.machine.replan import adjustment
from pipelines.sleep.base import base_records, base_sequences
from pipelines.sleep.engine import HeldState
from pipelines.sleep.judged import judge_candidate
from pipelines.sleep.plan import RoundPlan, num_steps
from pipelines.sleep.round import Candidate, Pinned, Weights, run_round
from pipelines.wake.learner import Learner
from pipelines.wake.report import Mark
from pipelines.wake.writes import no_offset, with_budget

WORLD = 2
"""Shards of a release."""


@dataclass(frozen=True)
class Found:
    """A candidate as its round left it, before anything is written."""

    plan: RoundPlan
    made: Candidate
    seen: List[str]
    """Sources of the base and of the stream so far."""

    @property
    def tensors(self) -> Dict[str, Tensor]:
        """What its release would hold."""
        return join(weight=self.made.weights, offset=self.made.offset)


class _WithReleases(MemoryHost):
    """A learner's things in memory; what it adopts is read from disk."""

    def __init__(self, store: MemoryStore, published: Releases) -> None:
        super().__init__(store, {})
        self.published = published

    def release(self, number: int) -> Tuple[Weights, Weights]:
        """(weights, offsets) of a release."""
        tensors = load_release(self.published.directory(number))
        return split(tensors, "weight"), split(tensors, "offset")


class HonestRun:
    """A run of a small model: its base is trained first, then `wake` and `sleep`, `night` take turns."""

    def __init__(self, cfg: Config, path: Path) -> None:
        self.setting = open_data(cfg)
        self.cfg = cfg = with_budget(cfg, self.setting.tokenizer.vocab_size)
        self.host = LocalHost(cfg, self.setting, path)
        self.measures = Judge(self.setting.probes(), cfg)
        self.releases = Releases(path / "releases")
        self.store = MemoryStore(cfg.model.context, self.setting.tokenizer.dtype)
        self.kept = _WithReleases(self.store, self.releases)
        self.round, self.live, self.consolidated, self.trained_steps = 0, 0, -1, 0
        self.decisions: List[str] = []
        self.trainer: Optional[HeldState] = None
        """What the round that made the live release left behind."""
        self.best = self._publish_base()
        self.learner = Learner(cfg, self.setting, self.kept)
        self.learner.restore()
        self.mark: Optional[Mark] = None

    def _publish_base(self) -> Dict[str, float]:
        """Pretrain and publish release 0; returns its bits per byte by source."""
        cfg, setting = self.cfg, self.setting
        sequences = base_sequences(setting.corpus, setting.tokenizer, cfg, setting.base_sources)
        self.store.append(base_records(sequences))
        weights, model = pretrain(cfg, self.host, sequences), self.host.build_model()
        load_into(model, weights)
        tensors = join(weight=weights, offset=no_offset(model, cfg, weights))
        shards = self.write(self.releases.prepare(0), tensors, "")
        self.releases.publish(Release(0, None, 0, 0, -1, 0, shards_fingerprint(shards), shards))
        return score(model, self.measures.reported, setting.sources, cfg.compute.precision)

    def wake(self) -> bool:
        """Read until a round is due; whether the stream went as far."""
        marks = self.learner.advance(sys.maxsize).marks
        self.mark = marks[0] if marks else None
        return self.mark is not None

    def sleep(self) -> Found:
        """Run a round over what came since the last promotion."""
        cfg, mark, self.round = self.cfg, self.mark, self.round + 1
        assert mark is not None, "a round is due only where the learner says so"
        changes = adjustment(self.decisions, cfg.gate)
        plan = RoundPlan(
            round=self.round,
            snapshot=mark.snapshot,
            first_key=self.consolidated + 1,
            last_key=mark.last_key,
            fast=mark.fast,
            anchor=self.live,
            tokens=mark.tokens,
            steps=num_steps(cfg.sleep, self.consolidated + 1, mark.last_key),
            seed=cfg.run.seed * 1_000_003 + self.round,
            recent_scale=changes.recent_scale,
            lr_scale=changes.lr_scale,
            trained_steps=self.trained_steps,
            store_seed=cfg.run.seed,
        )
        weights, offset = self.kept.release(self.live)
        trainer = self.trainer if cfg.sleep.carry != "nothing" else None
        pinned = Pinned(plan, self.store.at(plan.snapshot), weights, offset, self.kept.pins[plan.fast], trainer)
        seen = {*self.setting.base_sources, *self.learner.spans}
        return Found(plan, run_round(pinned, self.host, self.host.keep), [s for s in self.setting.sources if s in seen])

    def identity(self, found: Found) -> str:
        """What the shards of a candidate carry."""
        return candidate_identity(found.plan, self.releases.read(found.plan.anchor).fingerprint)

    def write(self, directory: Path, tensors: Mapping[str, Tensor], identity: str) -> List[Shard]:
        """Write a release's shards as two ranks would."""
        names = sorted(tensors)
        return [
            write_shard(directory, rank, WORLD, {n: tensors[n] for n in names[rank::WORLD]}, identity)
            for rank in range(WORLD)
        ]

    def judge(
        self, found: Found, tensors: Mapping[str, Tensor], ending: Optional[float], directory: Path, shards: List[Shard]
    ) -> Tuple[Decision, Dict[str, float]]:
        """The gate's decision, and bits per byte by source for the matrix.

        It sees the files as they lie there now, and scores of the weights that are to be released.

        Args:
            tensors: what the release would hold. Of weights that no model of this run can hold, the anchor's are
                measured: files are what stops these.
            ending: loss that training ended with.
        """
        read = [inspect_shard(directory / shard.file) for shard in shards]
        weights = {name: p.detach() for name, p in found.made.models.anchor.named_parameters()}
        for name, tensor in split(tensors, "weight").items():
            if name in weights and weights[name].shape == tensor.shape:
                weights[name] = tensor
        made = replace(found.made, weights=weights, ending=ending)
        verdict = judge_candidate(self.measures, made, found.plan.anchor, list(self.best), self.host)
        storage = gather_storage(self.releases, found.plan, shards, read)
        evidence = gather_evidence([verdict], storage, found.seen, self.best, self.cfg.run.seed)
        return decide(evidence, self.cfg.gate), verdict.row

    def night(self, found: Found) -> Decision:
        """The decision on a candidate, which goes live where it is promoted."""
        number, plan = self.live + 1, found.plan
        directory = self.releases.prepare(number)
        shards = self.write(directory, found.tensors, self.identity(found))
        decision, row = self.judge(found, found.tensors, found.made.ending, directory, shards)
        self.decisions.append(decision.word)
        if not decision.promoted:
            self.releases.discard(number)
            return decision
        origin = (number, plan.anchor, plan.round, plan.snapshot, plan.last_key, plan.tokens)
        self.releases.publish(Release(*origin, shards_fingerprint(shards), shards))
        adopted = self.learner.adopt(number).adopted
        assert adopted, "a mark lies on a boundary of the learner's levels"
        self.live, self.consolidated, self.trainer = number, plan.last_key, found.made.left
        self.trained_steps += plan.steps
        self.best = {source: min(old, row[source]) for source, old in self.best.items()}
        return decision
