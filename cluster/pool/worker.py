"""Actor `ConsolidationWorker`: one DeepSpeed rank of the consolidation pool."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Optional, Protocol, Tuple

import numpy as np
import ray
import torch
from torch import Tensor

from cluster.actors.start import configure_torch
from cluster.pool.dreaming import dream_together
from cluster.pool.judge import Judge, Verdict, candidate_identity, ending_loss
from cluster.storage.releases import Shard, inspect_shard, load_release, read_release, split, write_shard
from cluster.storage.training_state import RoundStates, read_state, write_state
from nl_model.config import OptimizerConfig
from nl_model.flops import forward_flops, full_step_flops
from nl_model.model import NestedLM, autocast, resolve_device
from nl_model.weights import load_into, load_tensors
from pipelines.config.schema import Config
from pipelines.data.module import open_setting
from pipelines.experience import Snapshot
from pipelines.gate.evidence import ShardFacts
from pipelines.gate.probe import score
from pipelines.machine.replan import adjusted
from pipelines.sleep.base import BaseBatches, base_sequences, base_steps
from pipelines.sleep.batches import RoundBatches
from pipelines.sleep.guides import StoredGuides, write_guides
from pipelines.sleep.losses import merge_weights
from pipelines.sleep.objective import Lesson
from pipelines.sleep.plan import RoundPlan
from pipelines.sleep.schedule import learning_rate
from pipelines.sleep.student import expand, folded, receivers_due, student_step_flops

if TYPE_CHECKING:
    from cluster.pool.engine import StudentEngine

MOMENTS = "moments"
"""Folder of a release that holds the optimizer's moments of the round that made it (sleep.keep_moments)."""


class Batches(Protocol):
    """Batches as a pure function of the step."""

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Tuple[Tensor, Tensor]:
        """One rank's share of a step: tokens (B / world, S), recent mask (B / world,)."""

    def keys(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """Keys (B / world,) of the same."""


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
    resumed_at: int = 0
    """Steps that an earlier attempt had done."""
    flops: float = 0.0
    """FLOPs of this rank, passes of guides and of whoever spoke included."""
    dreams: Optional[Dict[str, Any]] = None
    """Rank 0: what was dreamt, as the round's record keeps it."""


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
        cfg = self.cfg
        sequences = base_sequences(self.setting.corpus, self.setting.tokenizer, cfg, self.setting.base_sources)
        model = self._model().reset_parameters(cfg.run.seed)
        neutral = model.owned_by("learner")
        self.step_flops = full_step_flops(cfg.model, cfg.levels, self.setting.tokenizer.vocab_size)
        size = cfg.base.batch * cfg.pool.ranks
        batches = BaseBatches(sequences, size, cfg.run.seed)
        optimizer = OptimizerConfig(lr=cfg.base.lr)
        states = self._states({"base": base_steps(cfg), "batch": size, "seed": cfg.run.seed})
        lesson = Lesson(cfg.sleep, base_steps(cfg), cfg.run.seed, model)
        result, weights = self._train(lesson, batches, size, optimizer, neutral, states)
        tensors = {f"weight/{n}": t for n, t in weights.items()}
        tensors.update({f"offset/{n}": torch.zeros_like(weights[n]) for n in neutral})
        result.shard = write_shard(Path(directory), self.rank, self.world, self._share(tensors))
        self._finish(states)
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
        share = (self.rank, self.world)
        night = dream_together(cfg, plan, snapshot, awake, Path(directory), self.setting.tokenizer, share)
        batches = RoundBatches(snapshot, plan, sleep, night.tokens, cfg.dreams)
        receivers = receivers_due(cfg.levels, plan.first_key * cfg.model.context, plan.tokens)
        expansion = expand(student, receivers, sleep, plan.seed)
        teacher, old = awake if sleep.teacher else None, anchor if sleep.anchor else None
        lesson = Lesson(sleep, plan.steps, plan.seed, student, teacher, old)
        if teacher is not None and sleep.guide == "stored":
            lesson.stored, lesson.passed = self._store_guides(Path(directory), batches.visited(plan.steps), teacher)
        self.step_flops = student_step_flops(student, expansion, sleep)
        states = self._states(plan.to_json())
        kept = (Path(anchor_dir) / MOMENTS, Path(directory) / MOMENTS) if sleep.keep_moments else None
        size, optimizer = sleep.batch, sleep.optimizer
        result, trained = self._train(lesson, batches, size, optimizer, expansion.frozen, states, kept)
        if sleep.mode == "slots":
            plain, tokens = self._model(), batches.batch(0)[0][:, :-1].to(self.device)
            result.loss["fold"] = folded(plain, trained, expansion, sleep, plan.seed, tokens).divergence or 0.0
            trained = {name: p.detach().cpu() for name, p in plain.named_parameters()}
        if sleep.merge:
            trained = merge_weights(trained, weights, sleep.merge)
        forward = forward_flops(cfg.model, cfg.levels, self.setting.tokenizer.vocab_size)
        result.dreams, result.flops = night.record, result.flops + night.passes * forward
        tensors = {f"weight/{n}": t for n, t in trained.items()}
        tensors.update({f"offset/{n}": trained[n] - u for n, u in unshifted.items()})
        identity = candidate_identity(plan, read_release(Path(anchor_dir)).fingerprint)
        result.shard = write_shard(Path(directory), self.rank, self.world, self._share(tensors), identity)
        candidate = self._model()
        load_into(candidate, trained)
        mine, recent = seen[self.rank :: self.world], batches.recent_sources()
        last = batches.batch(max(0, plan.steps - 1), self.rank, self.world)[0].to(self.device)
        stored = ending_loss(candidate, last, cfg.compute.precision)
        ending = (stored if sleep.merge else result.ending, stored)  # averaged weights were never trained at
        result.verdict = self.judge.measure(plan.anchor, candidate, anchor, awake, mine, recent, ending)
        self._finish(states)
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

    def _states(self, key: Dict[str, Any]) -> RoundStates:
        return RoundStates(self.run_dir / "checkpoints" / "pool", key, self.cfg.pool.checkpoint_every)

    def _finish(self, states: RoundStates) -> None:
        """The shard is on disk. Should another rank fail yet, the repeated attempt begins anew."""
        if not self.rank:
            states.clear()

    def _share(self, tensors: Dict[str, Tensor]) -> Dict[str, Tensor]:
        return {name: tensors[name] for name in sorted(tensors)[self.rank :: self.world]}

    def _train(
        self,
        lesson: Lesson,
        batches: Batches,
        batch: int,
        optimizer: OptimizerConfig,
        frozen: Iterable[str] = (),
        states: Optional[RoundStates] = None,
        kept: Optional[Tuple[Path, Path]] = None,
    ) -> Tuple[RankResult, Dict[str, Tensor]]:
        """Train the student and return this rank's result and the full weights.

        Args:
            states: where it may go on from, and what it leaves on its way.
            kept: directories of the moments it starts with, and of those it ends with.
        """
        from cluster.pool.engine import StudentEngine  # noqa: PLC0415

        cfg, steps, start = self.cfg, lesson.steps, time.perf_counter()
        result = RankResult(self.rank, Shard("", "", []), steps, 0.0)
        sums: Dict[str, List[float]] = {}
        state = states.newest() if states is not None else None
        if state is not None:
            load_into(lesson.student, state.weights())
            result.resumed_at = state.step
            progress = state.progress_of(self.rank, self.world)
            lesson.trained, lesson.passed, sums = progress["trained"], progress["passed"], progress["losses"]
        before = state if state is not None or kept is None else read_state(kept[0])
        engine = StudentEngine(lesson.student, optimizer, cfg.pool, batch // self.world, frozen, before)
        for step in range(result.resumed_at, steps):
            tokens, recent = (t.to(self.device) for t in batches.batch(step, self.rank, self.world))
            keys = batches.keys(step, self.rank, self.world)
            found = self._step(engine, lesson, step, tokens, recent, keys, learning_rate(optimizer.lr, step, steps))
            self.done = (step + 1, steps, found["total"])
            if step >= steps - max(1, steps // 5):
                for name, value in found.items():
                    sums.setdefault(name, []).append(value)
            if states is not None:
                so_far = {"trained": lesson.trained, "passed": lesson.passed, "losses": sums}
                states.after(engine, step + 1, steps, so_far)
        result.loss = {name: sum(values) / len(values) for name, values in sums.items()}
        result.flops = self._flops(lesson)
        last = batches.batch(max(0, steps - 1), self.rank, self.world)[0].to(self.device)
        result.ending = ending_loss(engine, last, cfg.compute.precision)
        result.optimizer_bytes = engine.optimizer_bytes()
        weights = dict(engine.weights())
        if kept is not None:
            write_state(kept[1], engine, {"steps": steps}, steps, weights=False)
        engine.close()
        result.seconds = time.perf_counter() - start
        return result, weights

    def _step(
        self,
        engine: StudentEngine,
        lesson: Lesson,
        step: int,
        tokens: Tensor,
        recent: Tensor,
        keys: np.ndarray,
        lr: float,
    ) -> Dict[str, float]:
        """One step in as many passes as the engine makes of it; returns the losses, means over the passes."""
        found: Dict[str, List[Tensor]] = {}
        for i in range(engine.passes):
            rows = slice(i, None, engine.passes)  # every pass has its share of recent and of old experience
            with autocast(self.device, self.cfg.compute.precision):
                loss, parts = lesson.loss(step, engine, tokens[rows], recent[rows], keys[rows])
            engine.step(loss, lr)
            for name, value in {"total": loss.detach(), **parts}.items():
                found.setdefault(name, []).append(value)
        return {name: float(sum(values)) / len(values) for name, values in found.items()}

    def _flops(self, lesson: Lesson) -> float:
        shape = (self.cfg.model, self.cfg.levels, self.setting.tokenizer.vocab_size)
        return float(lesson.trained * self.step_flops + lesson.passed * forward_flops(*shape))

    def _store_guides(self, directory: Path, rows: np.ndarray, teacher: NestedLM) -> Tuple[StoredGuides, int]:
        """Write this rank's share of the teacher's guides; returns those of all ranks, and the tokens read for it."""
        assert self.snapshot is not None
        paths = [directory / f"guides-{rank:05d}.arrow" for rank in range(self.world)]
        mine, precision = rows[self.rank :: self.world], self.cfg.compute.precision
        tokens = write_guides(paths[self.rank], teacher, self.snapshot, mine, self.cfg.sleep.top_k, precision)
        torch.distributed.barrier()
        stored = StoredGuides(paths)
        torch.distributed.barrier()
        paths[self.rank].unlink()  # what is mapped stays readable; the candidate keeps nothing of it
        return stored, tokens
