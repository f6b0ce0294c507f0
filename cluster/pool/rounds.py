"""Rounds: what is pinned, run on the pool, judged by the gate, and published. Runs beside the learner, in a thread."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple, TypeVar

from ray.exceptions import RayError

from cluster.pool.evidence import gather_storage
from cluster.pool.group import PoolError, WorkerGroup
from cluster.pool.worker import TRAINER, RankResult
from cluster.storage.releases import Release, Releases, shards_fingerprint
from pipelines.config.schema import Config
from pipelines.gate.decision import Decision, decide
from pipelines.gate.evidence import ShardFacts
from pipelines.gate.judge import gather_evidence
from pipelines.machine.records import RoundRecord
from pipelines.sleep.plan import RoundPlan

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """A finished round: its plan, the ranks' results, and the decision."""

    plan: RoundPlan
    ranks: List[RankResult]
    decision: Decision
    seconds: float
    backend: str

    @property
    def loss(self) -> Dict[str, float]:
        """Mean losses over the ranks."""
        names = {name for rank in self.ranks for name in rank.loss}
        return {n: sum(r.loss.get(n, 0.0) for r in self.ranks) / len(self.ranks) for n in sorted(names)}

    def record(self) -> RoundRecord:
        """The round as it stands in summary.json and in a release's index; no release yet."""
        return replace(
            RoundRecord.judged(self.plan, self.decision),
            seconds=self.seconds,
            fingerprint=shards_fingerprint([rank.shard for rank in self.ranks]),
            row={source: bpb for rank in self.ranks for source, bpb in rank.verdict.row.items()},
            loss=self.loss,
            flops=sum(rank.flops for rank in self.ranks),
            optimizer_bytes=tuple(rank.optimizer_bytes for rank in self.ranks),
            backend=self.backend,
            trainer=self.ranks[0].trainer,
            dreams=self.ranks[0].dreams or None,
        )


class RoundRunner:
    """Owns the pool, and a thread in which it works: one job at a time. What fails is the machine's to repeat."""

    def __init__(self, cfg: Config, run_dir: Path, tokenizer_state: Dict[str, Any]) -> None:
        self.cfg, self.run_dir = cfg, run_dir
        self.releases = Releases(run_dir / "releases")
        self.group = WorkerGroup(cfg, str(run_dir), tokenizer_state)
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rounds")
        self.stopping = False

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Do something beside the caller, after what was submitted before."""
        return self.thread.submit(job)

    def with_pool(self, call: Callable[[WorkerGroup], T]) -> T:
        """Call something on a started pool. PoolError or RayError where a rank dies; the pool is gone then."""
        try:
            if not self.group.started:
                self.group.start(lambda: not self.stopping)
            return call(self.group)
        except (PoolError, RayError):
            self.group.kill()
            raise

    def run_round(self, plan: RoundPlan, seen: Sequence[str], best: Dict[str, float]) -> Outcome:
        """Train a candidate and have the gate judge it. The same plan gives the same candidate.

        Args:
            seen: sources that the gate counts.
            best: best bits per byte so far by source, of every source that is probed.
        """
        start = time.perf_counter()
        number, sources = plan.anchor + 1, list(best)

        def attempt(group: WorkerGroup) -> Tuple[List[RankResult], List[ShardFacts]]:
            directory = self.releases.prepare(number)
            anchor = str(self.releases.directory(plan.anchor))
            ranks = group.collect(group.async_call("run_round", plan, anchor, str(directory), sources))
            files = [rank.shard.file for rank in ranks]
            found = group.collect(group.async_call("inspect", str(directory), files))
            return ranks, [facts for part in found for facts in part]

        ranks, found = self.with_pool(attempt)
        shards, verdicts = [rank.shard for rank in ranks], [rank.verdict for rank in ranks]
        storage = gather_storage(self.releases, plan, shards, found)
        evidence = gather_evidence(verdicts, storage, list(seen), best, self.cfg.run.seed)
        decision = decide(evidence, self.cfg.gate)
        return Outcome(plan, ranks, decision, time.perf_counter() - start, self.group.backend)

    def publish(self, outcome: Outcome, record: RoundRecord, audit: Dict[str, Any]) -> None:
        """Publish a promoted candidate as the release that its record names.

        Args:
            audit: end of the audit log so far, kept in the release's index.
        """
        plan, shards = outcome.plan, [rank.shard for rank in outcome.ranks]
        assert record.release is not None
        for old in self.releases.numbers()[:-1]:  # what no round will go on from any more would fill the disk
            shutil.rmtree(self.releases.directory(old) / TRAINER, ignore_errors=True)
        self.releases.publish(
            Release(
                number=record.release,
                parent=plan.anchor,
                round=plan.round,
                snapshot=plan.snapshot,
                last_key=plan.last_key,
                tokens=plan.tokens,
                fingerprint=shards_fingerprint(shards),
                shards=shards,
                record=record.to_json(),
                audit=audit,
            )
        )

    def publish_base(self, directory: Path, ranks: List[RankResult]) -> None:
        """Publish what `pretrain` wrote into `directory` as release 0."""
        shards = [rank.shard for rank in ranks]
        record = {"steps": ranks[0].steps, "seconds": ranks[0].seconds, "loss": ranks[0].loss}
        base = Release(0, None, 0, 0, -1, 0, shards_fingerprint(shards), shards, record)
        Releases(directory.parent).publish(base)

    def stop(self) -> None:
        """Kill the pool; what it was doing is given up and will be repeated by the next run."""
        self.stopping = True
        self.group.kill()
        self.thread.shutdown(wait=False, cancel_futures=True)
