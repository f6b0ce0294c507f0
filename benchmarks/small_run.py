"""A run in one process, without Ray: wake, rounds of sleep, releases and the gate, on models that train in seconds.

It does what the processes of a run do, with the same functions, so that candidates for the gate are real ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional

import torch
from torch import Tensor

from cluster.pool.judge import Judge, candidate_identity, ending_loss, gather_evidence, gather_storage
from cluster.storage.releases import (
    Release,
    Releases,
    Shard,
    inspect_shard,
    load_release,
    shards_fingerprint,
    split,
    write_shard,
)
from nl_model.model import NestedLM
from nl_model.optim.levelwise import build_optimizer
from nl_model.weights import load_into, parameters_of
from pipelines.config.schema import Config
from pipelines.data.module import open_setting
from pipelines.experience import ExperienceStore, Record, Snapshot
from pipelines.gate.decision import Decision, decide
from pipelines.gate.evidence import Evidence
from pipelines.gate.probe import score
from pipelines.sleep.base import BaseBatches, base_records, base_sequences
from pipelines.sleep.batches import RoundBatches
from pipelines.sleep.losses import guide_logits, sleep_loss
from pipelines.sleep.plan import RoundPlan, num_steps
from pipelines.sleep.schedule import learning_rate
from pipelines.wake.awake import Awake

Tensors = Dict[str, Tensor]
WORLD = 2
"""Shards of a release."""


@dataclass(frozen=True)
class Candidate:
    """A candidate as training left it, before anything is written."""

    plan: RoundPlan
    tensors: Tensors
    """What its release would hold."""
    anchor: NestedLM
    awake: NestedLM
    recent: List[str]
    """Sources of the round's recent experience."""
    seen: List[str]
    """Sources of the base and of the stream so far."""
    last: Tensor
    """(B, S) int64 tokens of the last batch."""
    ending: float
    """Loss of the student on it when training had ended, in nats per token."""


class SmallRun:
    """A run of a small model: its base is trained first, then a period of `wake` and a `sleep` take turns."""

    def __init__(self, cfg: Config, path: Path) -> None:
        self.cfg, self.path = cfg, path
        self.setting = open_setting(cfg)
        self.stream = self.setting.stream()
        self.judge = Judge(self.setting.probes(), cfg)
        self.releases = Releases(path / "releases")
        self.period = min(level.period for level in cfg.levels.values() if level.owner == "pool")
        self.store = ExperienceStore.open(path / "store", cfg.model.context, self.setting.tokenizer.dtype, cfg.store)
        self.seen = list(self.setting.base_sources)
        self.round, self.live, self.consolidated = 0, 0, -1
        model = self._base()
        self.best = score(model, self.judge.probes, self.setting.sources)
        self.awake = Awake(model, cfg.compute)

    def _model(self, weights: Optional[Mapping[str, Tensor]] = None) -> NestedLM:
        model = NestedLM(self.cfg.model, self.cfg.levels, self.setting.tokenizer.vocab_size)
        load_into(model, weights or {})
        return model

    def _base(self) -> NestedLM:
        cfg = self.cfg
        sequences = base_sequences(self.setting.corpus, self.setting.tokenizer, cfg, self.setting.base_sources)
        self.store.append(base_records(sequences))
        self.store.commit()
        model = self._model().reset_parameters(cfg.run.seed)
        batches = BaseBatches(sequences, cfg.base.batch, cfg.run.seed)
        neutral = set(model.owned_by("learner"))
        trained = [p for name, p in model.named_parameters() if name not in neutral]
        optimizer = build_optimizer(trained, replace(cfg.sleep.optimizer, lr=cfg.base.lr))
        steps = cfg.base.tokens // (cfg.base.batch * cfg.model.context)
        for step in range(steps):
            plain_step(optimizer, model.nll(batches.batch(step)[0]).mean(), learning_rate(cfg.base.lr, step, steps))
        tensors = {f"weight/{name}": p.detach().clone() for name, p in model.named_parameters()}
        tensors.update({f"offset/{name}": torch.zeros_like(tensors[f"weight/{name}"]) for name in sorted(neutral)})
        shards = self.write(self.releases.prepare(0), tensors, "")
        self.releases.publish(Release(0, None, 0, 0, -1, 0, shards_fingerprint(shards), shards))
        return model

    def wake(self) -> bool:
        """Read one period of the stream; whether there was one."""
        end = self.awake.tokens + self.period
        while self.awake.tokens < end:
            batch = self.stream.next_batch(self.cfg.wake.batch)
            if len(batch) < self.cfg.wake.batch:
                return False
            self.awake.step(batch, self._log)
            self.last_key = batch[-1].key
            self.seen += [s.source for s in batch if s.source not in self.seen]
        return True

    def _log(self, records: List[Record]) -> Callable[[], None]:
        self.store.append(records, {"key": records[-1].key})

        def wait_until_durable() -> None:
            self.version = self.store.commit()

        return wait_until_durable

    def sleep(self) -> Candidate:
        """Run a round over what came since the last promotion."""
        cfg, self.round = self.cfg, self.round + 1
        plan = RoundPlan(
            round=self.round,
            snapshot=self.version,
            first_key=self.consolidated + 1,
            last_key=self.last_key,
            fast="",
            anchor=self.live,
            tokens=self.awake.tokens,
            steps=num_steps(cfg.sleep, self.last_key - self.consolidated),
            seed=cfg.run.seed * 1_000_003 + self.round,
        )
        live, unshifted = self.load(self.live), self.awake.unshifted()
        weights, offset = split(live, "weight"), split(live, "offset")
        fast = {name: u + offset[name] for name, u in unshifted.items()}
        anchor, awake, student = self._model(weights), *(self._model({**weights, **fast}) for _ in range(2))
        batches = RoundBatches(Snapshot.open(self.path / "store", self.version), plan, cfg.sleep)
        optimizer = build_optimizer(student.parameters(), cfg.sleep.optimizer)
        for step in range(plan.steps):
            tokens, recent = batches.batch(step)
            guides = guide_logits(awake, anchor, tokens, recent)
            loss, _ = sleep_loss(student(tokens[:, :-1]), tokens, recent, guides, cfg.sleep)
            plain_step(optimizer, loss, learning_rate(cfg.sleep.optimizer.lr, step, plan.steps))
        trained = {name: p.detach().clone() for name, p in student.named_parameters()}
        tensors = {f"weight/{name}": t for name, t in trained.items()}
        tensors.update({f"offset/{name}": trained[name] - u for name, u in unshifted.items()})
        last = batches.batch(plan.steps - 1)[0]
        ending = ending_loss(student, last, cfg.compute.precision)
        return Candidate(plan, tensors, anchor, awake, batches.recent_sources(), list(self.seen), last, ending)

    def load(self, number: int) -> Tensors:
        """Tensors of a release."""
        return load_release(self.releases.directory(number))

    def identity(self, candidate: Candidate) -> str:
        """What the shards of a candidate carry."""
        return candidate_identity(candidate.plan, self.releases.read(candidate.plan.anchor).fingerprint)

    def write(self, directory: Path, tensors: Mapping[str, Tensor], identity: str) -> List[Shard]:
        """Write a release's shards as two ranks would."""
        names = sorted(tensors)
        return [
            write_shard(directory, rank, WORLD, {n: tensors[n] for n in names[rank::WORLD]}, identity)
            for rank in range(WORLD)
        ]

    def evidence(self, candidate: Candidate, directory: Path, shards: List[Shard]) -> Evidence:
        """What the gate sees: the files as they lie there now, and scores of the weights that training left."""
        found = [inspect_shard(directory / shard.file) for shard in shards]
        wanted = {name for name, _ in candidate.anchor.named_parameters()}
        weights = {n: t for n, t in split(candidate.tensors, "weight").items() if n in wanted}
        shapes = {name: p.shape for name, p in candidate.anchor.named_parameters()}
        student = self._model(split(self.load(candidate.plan.anchor), "weight"))
        load_into(student, {n: t for n, t in weights.items() if t.shape == shapes[n]})
        self.judge.known.pop(candidate.plan.anchor + 1, None)  # candidates of one round share a number
        ending = (candidate.ending, ending_loss(student, candidate.last, self.cfg.compute.precision))
        models, of = (student, candidate.anchor, candidate.awake), (candidate.seen, candidate.recent, ending)
        verdict = self.judge.measure(candidate.plan.anchor, *models, *of)
        storage = gather_storage(self.releases, candidate.plan, shards, found)
        return gather_evidence([verdict], storage, candidate.seen, self.best, self.cfg.run.seed)

    def night(self, candidate: Candidate) -> Decision:
        """The decision on a candidate, which goes live where it is promoted."""
        number = self.live + 1
        directory = self.releases.prepare(number)
        shards = self.write(directory, candidate.tensors, self.identity(candidate))
        decision = decide(self.evidence(candidate, directory, shards), self.cfg.gate)
        if not decision.promoted:
            self.releases.discard(number)
            return decision
        plan = candidate.plan
        origin = (number, plan.anchor, plan.round, plan.snapshot, plan.last_key, plan.tokens)
        self.releases.publish(Release(*origin, shards_fingerprint(shards), shards))
        pool = set(parameters_of(candidate.anchor, "pool"))
        slow = {n: t for n, t in split(candidate.tensors, "weight").items() if n in pool}
        self.awake.adopt(number, slow, split(candidate.tensors, "offset"))
        self.live, self.consolidated = number, plan.last_key
        scores = decision.figures["candidate"]
        self.best = {s: min(old, scores.get(s, old)) for s, old in self.best.items()}
        return decision

    def close(self) -> None:
        """Close the store."""
        self.store.close()


def plain_step(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    """Write the gradient of a loss once, with step size `lr`."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
