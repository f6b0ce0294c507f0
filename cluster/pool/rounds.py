"""Rounds: what is pinned, run on the pool, judged by the gate, and published. Runs beside the learner, in a thread."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from ray.exceptions import RayError

from cluster.driver.failures import Budgets
from cluster.pool.dreaming import dreams_stored
from cluster.pool.evidence import gather_storage
from cluster.pool.group import PoolError, WorkerGroup
from cluster.pool.worker import RankResult
from cluster.storage.releases import Release, Releases, shards_fingerprint
from pipelines.config.schema import Config
from pipelines.gate.decision import Decision, decide
from pipelines.gate.evidence import ShardFacts
from pipelines.gate.judge import gather_evidence
from pipelines.machine.replan import Adjustment
from pipelines.sleep.plan import RoundPlan, num_steps

logger = logging.getLogger(__name__)
Emit = Callable[..., Dict[str, Any]]


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

    def record(self, release: Optional[int]) -> Dict[str, Any]:
        """The round as it stands in summary.json and in a release's index."""
        return {
            "id": self.plan.round,
            "snapshot": self.plan.snapshot,
            "tokens": self.plan.tokens,
            "anchor": self.plan.anchor,
            "release": release,
            "steps": self.plan.steps,
            "seconds": self.seconds,
            "recent_scale": self.plan.recent_scale,
            "lr_scale": self.plan.lr_scale,
            "fingerprint": shards_fingerprint([rank.shard for rank in self.ranks]),
            "decision": self.decision.word,
            "reason": self.decision.reason,
            "figures": self.decision.figures,
            "row": {s: v for rank in self.ranks for s, v in rank.verdict.row.items()},
            "trainer": self.ranks[0].trainer,
            "loss": self.loss,
            "flops": sum(rank.flops for rank in self.ranks),
            "optimizer_bytes": [rank.optimizer_bytes for rank in self.ranks],
            "backend": self.backend,
            **({"dreams": self.ranks[0].dreams} if self.ranks[0].dreams else {}),
        }


class RoundRunner:
    """Owns the pool. One round at a time; a failed attempt is repeated from its plan, within the budget."""

    def __init__(
        self, cfg: Config, run_dir: Path, tokenizer_state: Dict[str, Any], budgets: Budgets, emit: Emit
    ) -> None:
        self.cfg, self.run_dir, self.budgets, self.emit = cfg, run_dir, budgets, emit
        self.releases = Releases(run_dir / "releases")
        self.group = WorkerGroup(cfg, str(run_dir), tokenizer_state)
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rounds")
        self.stopping = False

    def plan(
        self,
        number: int,
        mark: Dict[str, Any],
        consolidated_key: int,
        live: int,
        adjustment: Adjustment = Adjustment(),  # noqa: B008 (frozen)
    ) -> RoundPlan:
        """The plan of a round over everything between the last consolidated key and a mark."""
        return RoundPlan(
            round=number,
            snapshot=mark["snapshot"],
            first_key=consolidated_key + 1,
            last_key=mark["last_key"],
            fast=mark["fast"],
            anchor=live,
            tokens=mark["tokens"],
            steps=num_steps(self.cfg.sleep, consolidated_key + 1, mark["last_key"]),
            seed=self.cfg.run.seed * 1_000_003 + number,
            recent_scale=adjustment.recent_scale,
            lr_scale=adjustment.lr_scale,
            dreams_stored=dreams_stored(self.releases, live) if self.cfg.dreams.share else 0,
        )

    def start(self, plan: RoundPlan, seen: List[str], best: Dict[str, float]) -> Future[Outcome]:
        """Run a round in the background.

        Args:
            seen: sources that the gate counts.
            best: best bits per byte so far by source, of every source that is probed.
        """
        return self.thread.submit(self._run, plan, seen, best)

    def with_pool(self, call: Callable[[WorkerGroup], Any]) -> Any:
        """Call something on a started pool, restarting it within the budget where a rank dies."""
        while True:
            try:
                if not self.group.started:
                    self.group.start(lambda: not self.stopping)
                return call(self.group)
            except (PoolError, RayError) as error:
                self.group.kill()
                if self.stopping:
                    raise
                left = self.budgets.spend("pool", error)
                self.emit("failure", part="pool", error=str(error), restarts_left=left)

    def _run(self, plan: RoundPlan, seen: List[str], best: Dict[str, float]) -> Outcome:
        start = time.perf_counter()
        number, sources = plan.anchor + 1, list(best)

        def attempt(group: WorkerGroup) -> Tuple[List[RankResult], List[ShardFacts]]:
            directory = self.releases.prepare(number)
            anchor = str(self.releases.directory(plan.anchor))
            ranks = group.collect(group.async_call("run_round", plan, anchor, str(directory), sources))
            files = [rank.shard.file for rank in ranks]
            found = group.collect(group.async_call("inspect", str(directory), files))
            return ranks, [facts for part in found for facts in part]

        self.emit(
            "round_started",
            round=plan.round,
            snapshot=plan.snapshot,
            anchor=plan.anchor,
            steps=plan.steps,
            ranks=self.cfg.pool.ranks,
            zero_stage=self.cfg.pool.zero_stage,
        )
        ranks, found = self.with_pool(attempt)
        self.budgets.refill("pool")
        shards, verdicts = [rank.shard for rank in ranks], [rank.verdict for rank in ranks]
        storage = gather_storage(self.releases, plan, shards, found)
        evidence = gather_evidence(verdicts, storage, seen, best, self.cfg.run.seed)
        decision = decide(evidence, self.cfg.gate)
        outcome = Outcome(plan, ranks, decision, time.perf_counter() - start, self.group.backend)
        if self.cfg.pool.release_after_round:
            self.group.kill()
        return outcome

    def settle(self, outcome: Outcome, audit: Dict[str, Any]) -> Optional[int]:
        """Publish a promoted candidate as the next release, or remove it. Returns the release's number, if any.

        Args:
            audit: end of the audit log so far, kept in the release's index.
        """
        plan, number = outcome.plan, outcome.plan.anchor + 1
        if not outcome.decision.promoted:
            self.releases.discard(number)
            return None
        shards = [rank.shard for rank in outcome.ranks]
        self.releases.publish(
            Release(
                number=number,
                parent=plan.anchor,
                round=plan.round,
                snapshot=plan.snapshot,
                last_key=plan.last_key,
                tokens=plan.tokens,
                fingerprint=shards_fingerprint(shards),
                shards=shards,
                record=outcome.record(number),
                audit={key: audit[key] for key in ("length", "head") if key in audit},
            )
        )
        return number

    def publish_base(self, directory: Path, ranks: List[RankResult]) -> None:
        """Publish what `pretrain` wrote into `directory` as release 0."""
        shards = [rank.shard for rank in ranks]
        record = {"steps": ranks[0].steps, "seconds": ranks[0].seconds, "loss": ranks[0].loss}
        base = Release(0, None, 0, 0, -1, 0, shards_fingerprint(shards), shards, record)
        Releases(directory.parent).publish(base)

    def stop(self) -> None:
        """Kill the pool; a round in progress is given up and will be repeated by the next run."""
        self.stopping = True
        self.group.kill()
        self.thread.shutdown(wait=False, cancel_futures=True)
