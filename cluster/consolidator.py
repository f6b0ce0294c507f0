"""Actor `ConsolidationWorker`: one DeepSpeed rank of the consolidation pool."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Protocol, Tuple

import ray
import torch
from torch import Tensor

from cluster.actors import configure_torch
from cluster.judge import Judge, Verdict, candidate_identity, ending_loss
from cluster.releases import Shard, inspect_shard, load_release, read_release, split, write_shard
from nl_model.config import OptimizerConfig
from nl_model.flops import forward_flops, full_step_flops
from nl_model.model import NestedLM, autocast, resolve_device
from nl_model.weights import load_into, load_tensors
from pipelines.base import BaseBatches, base_sequences, base_steps
from pipelines.config import Config
from pipelines.evidence import ShardFacts
from pipelines.experience import Snapshot
from pipelines.probe import score
from pipelines.replan import adjusted
from pipelines.setting import open_setting
from pipelines.sleep import RoundBatches, RoundPlan, guide_logits, learning_rate, sleep_loss


class Batches(Protocol):
    """Batches as a pure function of the step."""

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Tuple[Tensor, Tensor]:
        """One rank's share of a step: tokens (B / world, S), recent mask (B / world,)."""


@dataclass
class RankResult:
    """What one rank brings home from training."""

    rank: int
    shard: Shard
    steps: int
    seconds: float
    loss: Dict[str, float] = field(default_factory=dict)
    """Means over the last fifth of the steps, on this rank's share."""
    verdict: Verdict = field(default_factory=Verdict)
    """What it measured on the sources that it scored."""
    ending: float = 0.0
    """Loss of the student on this rank's share of the last batch, once training had ended, in nats per token."""
    optimizer_bytes: int = 0
    flops: float = 0.0
    """FLOPs of this rank, teacher and anchor passes included."""


class ConsolidationWorker:
    """Trains students. The teacher and the anchor are plain modules, apart from the student's engine."""

    def __init__(self, cfg: Config, run_dir: str, tokenizer_state: Dict[str, Any]) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if resolve_device(cfg.compute.device).type == "cuda" else "cpu")
        configure_torch(cfg)
        self.cfg, self.run_dir = cfg, Path(run_dir)
        self.device = resolve_device(cfg.compute.device)
        self.setting = open_setting(cfg, tokenizer_state)
        self.probes = self.setting.probes()
        self.judge = Judge(self.probes, cfg)
        self.done: Tuple[int, int, float] = (0, 0, 0.0)
        self.snapshot: Optional[Snapshot] = None

    def whereabouts(self) -> Dict[str, Any]:
        """Node, address and GPU of this process, by which ranks are ordered, and its process id."""
        context = ray.get_runtime_context()
        gpus = ray.get_gpu_ids()
        return {
            "node": context.get_node_id(),
            "ip": ray.util.get_node_ip_address(),
            "gpu": gpus[:1],
            "pid": os.getpid(),
        }

    def free_port(self) -> int:
        """A port that is free on this node right now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def join(self, rank: int, world: int, address: str, port: int) -> str:
        """Form the process group; returns its backend."""
        from cluster.engine import join_group, pick_backend  # noqa: PLC0415 (DeepSpeed is slow to load: ranks only)

        self.rank, self.world = rank, world
        backend = pick_backend(self.cfg.pool.backend, self.device)
        join_group(rank, world, address, port, backend, self.cfg.pool.timeout)
        return str(torch.distributed.get_backend())

    @ray.method(concurrency_group="control")
    def progress(self) -> Tuple[int, int, float]:
        """(steps done, steps planned, last loss) of the running call."""
        return self.done

    def pretrain(self, directory: str) -> RankResult:
        """Train a base from scratch and write this rank's shard of it. The learner's levels stay neutral."""
        cfg = self.cfg
        sequences = base_sequences(self.setting.corpus, self.setting.tokenizer, cfg, self.setting.base_sources)
        model = self._model().reset_parameters(cfg.run.seed)
        neutral = model.owned_by("learner")
        size = cfg.base.batch * cfg.pool.ranks
        batches = BaseBatches(sequences, size, cfg.run.seed)
        optimizer = OptimizerConfig(lr=cfg.base.lr)
        result, weights = self._train(model, batches, base_steps(cfg), size, optimizer, None, None, neutral)
        tensors = {f"weight/{n}": t for n, t in weights.items()}
        tensors.update({f"offset/{n}": torch.zeros_like(weights[n]) for n in neutral})
        result.shard = write_shard(Path(directory), self.rank, self.world, self._share(tensors))
        return result

    def run_round(self, plan: RoundPlan, anchor_dir: str, directory: str, seen: List[str]) -> RankResult:
        """Run a round and write this rank's shard of the candidate.

        Args:
            anchor_dir: directory of the live release.
            directory: where shards of the candidate go.
            seen: sources to score.
        """
        cfg = self.cfg
        snapshot = self._snapshot(plan.snapshot)
        live = load_release(Path(anchor_dir))
        weights, offset = split(live, "weight"), split(live, "offset")
        unshifted, _ = load_tensors(self.run_dir / plan.fast)
        student, awake, anchor = self._model(), self._model(), self._model()
        load_into(anchor, weights)
        for model in (student, awake):
            load_into(model, {**weights, **{n: u + offset[n] for n, u in unshifted.items()}})
        sleep = adjusted(cfg.sleep, plan.recent_scale, plan.lr_scale)
        batches = RoundBatches(snapshot, plan, sleep)
        teacher, old = awake if sleep.teacher else None, anchor if sleep.anchor else None
        result, trained = self._train(student, batches, plan.steps, sleep.batch, sleep.optimizer, teacher, old)
        tensors = {f"weight/{n}": t for n, t in trained.items()}
        tensors.update({f"offset/{n}": trained[n] - u for n, u in unshifted.items()})
        identity = candidate_identity(plan, read_release(Path(anchor_dir)).fingerprint)
        result.shard = write_shard(Path(directory), self.rank, self.world, self._share(tensors), identity)
        candidate = self._model()
        load_into(candidate, trained)
        mine, recent = seen[self.rank :: self.world], batches.recent_sources()
        last = batches.batch(plan.steps - 1, self.rank, self.world)[0].to(self.device)
        ending = (result.ending, ending_loss(candidate, last, cfg.compute.precision))
        result.verdict = self.judge.measure(plan.anchor, candidate, anchor, awake, mine, recent, ending)
        return result

    def inspect(self, directory: str, files: List[str]) -> List[ShardFacts]:
        """Read back shards of a candidate that other ranks wrote (with one rank its own)."""
        return [inspect_shard(Path(directory) / file) for file in files[(self.rank + 1) % self.world :: self.world]]

    def score_release(self, directory: str) -> Dict[str, float]:
        """Bits per byte of a release at rest on this rank's share of all sources."""
        model = self._model()
        load_into(model, split(load_release(Path(directory)), "weight"))
        return score(model, self.probes, self.setting.sources[self.rank :: self.world], self.cfg.compute.precision)

    def _snapshot(self, version: int) -> Snapshot:
        """A snapshot of the store; what an earlier round opened is extended, not read again."""
        if self.snapshot is None or self.snapshot.version > version:
            self.snapshot = Snapshot.open(self.run_dir / "store", version)
        else:
            self.snapshot = self.snapshot.extend(version)
        return self.snapshot

    def _model(self) -> NestedLM:
        cfg = self.cfg
        return NestedLM(cfg.model, cfg.levels, self.setting.tokenizer.vocab_size).to(self.device)

    def _share(self, tensors: Dict[str, Tensor]) -> Dict[str, Tensor]:
        return {name: tensors[name] for name in sorted(tensors)[self.rank :: self.world]}

    def _train(
        self,
        student: NestedLM,
        batches: Batches,
        steps: int,
        batch: int,
        optimizer: OptimizerConfig,
        teacher: Optional[NestedLM],
        anchor: Optional[NestedLM],
        frozen: Iterable[str] = (),
    ) -> Tuple[RankResult, Dict[str, Tensor]]:
        """Train the student and return this rank's result and the full weights."""
        from cluster.engine import StudentEngine  # noqa: PLC0415

        cfg, start = self.cfg, time.perf_counter()
        engine = StudentEngine(student, optimizer, cfg.pool.zero_stage, batch // self.world, frozen)
        result = RankResult(self.rank, Shard("", "", []), steps, 0.0)
        sums: Dict[str, List[float]] = {}
        for step in range(steps):
            tokens, recent = (t.to(self.device) for t in batches.batch(step, self.rank, self.world))
            with autocast(self.device, cfg.compute.precision):
                guides = guide_logits(teacher, anchor, tokens, recent)
                loss, parts = sleep_loss(engine(tokens[:, :-1]), tokens, recent, guides, cfg.sleep)
            engine.step(loss, learning_rate(optimizer.lr, step, steps))
            result.flops += self._flops(tokens, recent, teacher is not None, anchor is not None)
            self.done = (step + 1, steps, float(loss.detach()))
            if step >= steps - max(1, steps // 5):
                for name, value in {"total": loss.detach(), **parts}.items():
                    sums.setdefault(name, []).append(float(value))
        result.loss = {name: sum(values) / len(values) for name, values in sums.items()}
        if steps:
            last = batches.batch(steps - 1, self.rank, self.world)[0].to(self.device)
            result.ending = ending_loss(engine, last, cfg.compute.precision)
        result.optimizer_bytes = engine.optimizer_bytes()
        weights = dict(engine.weights())
        engine.close()
        result.seconds = time.perf_counter() - start
        return result, weights

    def _flops(self, tokens: Tensor, recent: Tensor, teacher: bool, anchor: bool) -> float:
        shape = (self.cfg.model, self.cfg.levels, self.setting.tokenizer.vocab_size)
        guided = int(recent.sum()) * teacher + int((~recent).sum()) * anchor
        context = tokens.size(1) - 1
        return float(context * (len(tokens) * full_step_flops(*shape) + guided * forward_flops(*shape)))
