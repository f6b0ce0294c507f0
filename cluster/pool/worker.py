"""Actor `ConsolidationWorker`: one DeepSpeed rank of the consolidation pool."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

import ray
import torch
from torch import Tensor

from cluster.actors.start import configure_torch
from cluster.pool.evidence import candidate_identity
from cluster.storage.releases import Shard, inspect_shard, load_release, read_release, write_shard
from cluster.storage.training_state import RoundStates, read_state
from nl_model.flops import forward_flops, full_step_flops
from nl_model.model import NestedLM, resolve_device
from nl_model.weights import join, load_into, load_tensors, split
from pipelines.config.schema import Config
from pipelines.data.module import open_data
from pipelines.experience import Snapshot
from pipelines.gate.evidence import ShardFacts
from pipelines.gate.judge import Judge, Verdict
from pipelines.gate.probe import score
from pipelines.sleep.base import Pretraining, TrueTokens, base_sequences
from pipelines.sleep.judged import judge_candidate
from pipelines.sleep.plan import RoundPlan
from pipelines.sleep.round import Pinned, run_round
from pipelines.sleep.training import Place, Progress, train
from pipelines.wake.writes import no_offset

if TYPE_CHECKING:
    from cluster.pool.host import RankHost

TRAINER = "trainer"
"""Folder of a release that holds what the round that made it left behind (sleep.carry)."""


@dataclass(frozen=True)
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
    optimizer_bytes: int = 0
    resumed_at: int = 0
    """Steps that an earlier attempt had done."""
    flops: float = 0.0
    """FLOPs of this rank, passes of guides and of whoever spoke included."""
    dreams: Optional[Dict[str, Any]] = None
    """Rank 0: what was dreamt, as the round's record keeps it."""
    trainer: str = "cold"
    """Whether the trainer went on from what the last round left (pipelines/sleep/round.py)."""


class ConsolidationWorker:
    """Trains students. The teacher and the anchor are plain modules, apart from the student's engine."""

    def __init__(self, cfg: Config, run_dir: str, tokenizer_state: Dict[str, Any]) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if resolve_device(cfg.compute.device).type == "cuda" else "cpu")
        configure_torch(cfg)
        self.cfg, self.run_dir = cfg, Path(run_dir)
        self.device = resolve_device(cfg.compute.device)
        self.setting = open_data(cfg, tokenizer_state)
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
        from cluster.pool.engine import join_group, pick_backend  # noqa: PLC0415 (DeepSpeed is slow to load: ranks only)

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
        cfg, setting, start = self.cfg, self.setting, time.perf_counter()
        sequences = base_sequences(setting.corpus, setting.tokenizer, cfg, setting.base_sources)
        host = self._host(Path(directory))
        model = host.build_model().reset_parameters(cfg.run.seed)
        base = Pretraining.of(cfg, sequences, model)
        steps = base.schedule.steps
        resume = host.resume_training({"base": steps, "batch": base.batch, "seed": cfg.run.seed})
        if resume is not None:
            load_into(model, resume.state.weights())
        progress = resume.progress if resume is not None else Progress()
        resumed_at = progress.step
        state = resume.state if resume is not None else None
        engine = host.build_engine(model, base.optimizer, base.batch, base.frozen, state)
        tokens = base.batch // self.world * cfg.model.context
        train(
            engine,
            TrueTokens(),
            base.batches,
            base.schedule,
            self.device,
            precision=cfg.compute.precision,
            place=self.place,
            progress=progress,
            after=lambda progress, loss: host.after_any_step(
                engine, steps, progress, loss, {"trained_tokens": progress.step * tokens, "forward_tokens": 0}
            ),
        )
        optimizer_bytes, weights = engine.optimizer_bytes(), dict(engine.weights())
        engine.close()
        tensors = join(weight=weights, offset=no_offset(model, cfg, weights))
        shard = write_shard(Path(directory), self.rank, self.world, self._share(tensors))
        host.finish()
        return RankResult(
            rank=self.rank,
            shard=shard,
            steps=steps,
            seconds=time.perf_counter() - start,
            loss=progress.loss,
            optimizer_bytes=optimizer_bytes,
            resumed_at=resumed_at,
            flops=float(steps * tokens * full_step_flops(cfg.model, cfg.levels, setting.tokenizer.vocab_size)),
        )

    def run_round(self, plan: RoundPlan, anchor_dir: str, directory: str, seen: List[str]) -> RankResult:
        """Run a round, write this rank's shard of the candidate, and measure it.

        Args:
            anchor_dir: directory of the live release.
            directory: where shards of the candidate go.
            seen: sources to score.
        """
        cfg, start = self.cfg, time.perf_counter()
        live = load_release(Path(anchor_dir))
        unshifted, _ = load_tensors(self.run_dir / plan.fast)
        left = read_state(Path(anchor_dir) / TRAINER) if cfg.sleep.carry != "nothing" else None
        weights, offset = split(live, "weight"), split(live, "offset")
        pinned = Pinned(plan, self._snapshot(plan.snapshot), weights, offset, unshifted, left)
        host = self._host(Path(directory))
        found = run_round(pinned, host, host.keep)
        tensors = join(weight=found.weights, offset=found.offset)
        identity = candidate_identity(plan, read_release(Path(anchor_dir)).fingerprint)
        shard = write_shard(Path(directory), self.rank, self.world, self._share(tensors), identity)
        verdict = judge_candidate(self.judge, found, plan.anchor, seen[self.rank :: self.world], host)
        host.finish()
        forward = forward_flops(cfg.model, cfg.levels, self.setting.tokenizer.vocab_size)
        return RankResult(
            rank=self.rank,
            shard=shard,
            steps=found.steps,
            seconds=time.perf_counter() - start,
            loss=found.loss,
            verdict=verdict,
            optimizer_bytes=found.optimizer_bytes,
            resumed_at=found.resumed_at,
            flops=found.flops + verdict.tokens * forward,
            dreams=found.dreams,
            trainer=found.trainer,
        )

    def inspect(self, directory: str, files: List[str]) -> List[ShardFacts]:
        """Read back shards of a candidate that other ranks wrote (with one rank its own)."""
        return [inspect_shard(Path(directory) / file) for file in files[(self.rank + 1) % self.world :: self.world]]

    def score_release(self, directory: str) -> Dict[str, float]:
        """Bits per byte of a release at rest on this rank's share of all sources."""
        model = NestedLM(self.cfg.model, self.cfg.levels, self.setting.tokenizer.vocab_size).to(self.device)
        load_into(model, split(load_release(Path(directory)), "weight"))
        return score(
            model, self.judge.reported, self.setting.sources[self.rank :: self.world], self.cfg.compute.precision
        )

    def _snapshot(self, version: int) -> Snapshot:
        """A snapshot of the store; what an earlier round opened is extended, not read again."""
        if self.snapshot is None or self.snapshot.version > version:
            self.snapshot = Snapshot.open(self.run_dir / "store", version)
        else:
            self.snapshot = self.snapshot.extend(version)
        return self.snapshot

    def _host(self, directory: Path) -> RankHost:
        from cluster.pool.host import RankHost  # noqa: PLC0415 (DeepSpeed is slow to load: ranks only)

        def states(key: Dict[str, Any]) -> RoundStates:
            return RoundStates(self.run_dir / "checkpoints" / "pool", key, self.cfg.pool.checkpoint_every)

        def show(step: int, steps: int, loss: float) -> None:
            self.done = (step, steps, loss)

        self.done = (0, 0, 0.0)  # of the call before this one
        return RankHost(self.cfg, self.place, self.device, self.setting.tokenizer, directory, states, show)

    @property
    def place(self) -> Place:
        """Which of the ranks this is."""
        return Place(self.rank, self.world)

    def _share(self, tensors: Dict[str, Tensor]) -> Dict[str, Tensor]:
        return {name: tensors[name] for name in sorted(tensors)[self.rank :: self.world]}
