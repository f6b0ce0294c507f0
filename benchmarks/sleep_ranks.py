"""Sleep steps on real ranks: every ZeRO stage in turns with the same step in one process.

All of them are the one training step of a run, on other engines. Shapes: B sequences of a step and rank, T tokens, V
vocabulary, S = T + 1.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Dict, List, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.interleave import Rate, clock, interleave, one_thread
from benchmarks.scaling import Calls
from benchmarks.tables import Spread
from benchmarks.traffic import socket_bytes
from nl_model.config import OptimizerConfig
from nl_model.model import NestedLM, resolve_device
from nl_model.recall import Recall
from pipelines.config.schema import Config
from pipelines.data.stream import Sequence
from pipelines.data.tokens import build_tokenizer
from pipelines.sleep.base import TrueTokens
from pipelines.sleep.engine import LocalEngine, Steps
from pipelines.sleep.objective import GuidedObjective
from pipelines.sleep.training import Batch, Objective, training_step
from pipelines.wake.awake import Awake

if TYPE_CHECKING:
    from cluster.pool.engine import DeepSpeedEngine

PLAIN, PARALLEL, AWAKE = "one process", "data-parallel", "wake step"
BESIDE = "processes side by side"
"""A sleep step in every one, none of which waits for another: what sharing a machine costs."""
UNGUIDED = ", true tokens"
"""Ends the name of a way that takes plain training steps through the very engine that takes the sleep steps."""
STAGES = (0, 1, 2, 3)
Step = Callable[[], object]


@dataclass(frozen=True)
class Task:
    """What the ranks are to measure."""

    cfg: Config
    share: int
    """Sequences per step and rank, whatever the number of ranks."""
    repeats: int
    steps: int = 2
    """Steps per visit."""
    round_steps: int = 0
    """Steps whose bytes are counted; 0: none."""
    stages: Tuple[int, ...] = STAGES


@dataclass(frozen=True)
class Ranks:
    """What was measured on a number of ranks."""

    world: int
    rates: Dict[str, Rate]
    """Tokens per CPU-second of all ranks together (per second of a GPU), and by one process's, without DeepSpeed."""
    seconds: Dict[str, Spread]
    """Wall seconds per step."""
    moved: Dict[str, float] = field(default_factory=dict)
    """Bytes per rank over `round_steps` steps, sent and received, by the kernel's counters."""
    reductions: List[Tuple[float, float]] = field(default_factory=list)
    """All-reduces: (bytes, seconds)."""
    calls: Dict[str, Calls] = field(default_factory=dict)
    """Collectives per step, as torch's profiler counts them."""

    @property
    def crowding(self) -> float:
        """How much longer a process takes for a step where every rank takes one of its own; 1 where nobody shares."""
        return self.seconds[BESIDE].median / self.seconds[PLAIN].median if BESIDE in self.seconds else 1.0


def measure(task: Task, world: int) -> Ranks:
    """Start ranks on this machine and measure. RuntimeError where one fails, ValueError for fewer than one."""
    if world < 1:
        raise ValueError(f"world={world} must be at least 1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler is chatty
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    ranks = [context.Process(target=_run, args=(task, rank, world, port, answers)) for rank in range(world)]
    for process in ranks:
        process.start()
    try:
        while answers.empty():
            if any(process.exitcode for process in ranks):
                raise RuntimeError(f"a rank of {world} ended early; what it said stands above")
            time.sleep(0.1)
        found: Ranks = answers.get()
        for process in ranks:
            process.join(60)
        return found
    finally:
        for process in ranks:
            process.kill()


def _run(task: Task, rank: int, world: int, port: int, answers: Any) -> None:
    """One rank, from rendezvous to its end; rank 0 answers."""
    device = resolve_device(task.cfg.compute.device)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    from cluster.pool.engine import join_group, pick_backend  # noqa: PLC0415 (after the accelerator is chosen)

    if device.type == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    join_group(rank, world, "127.0.0.1", port, pick_backend(task.cfg.pool.backend, device), task.cfg.pool.timeout)
    with one_thread():
        found = measure_here(task)
    torch.distributed.barrier()
    if not rank:
        answers.put(found)
    torch.distributed.destroy_process_group()


def measure_here(task: Task) -> Ranks:
    """Measure in the process group that is there. A collective; every rank gets the figures."""
    world = torch.distributed.get_world_size()
    lessons = Lessons(task)
    steps: Dict[str, Step] = {AWAKE: lessons.awake()} if world == 1 else {PARALLEL: lessons.parallel()}
    engines = []
    for stage in task.stages:
        model = lessons.model()
        engine = lessons.engine(stage, model)
        engines.append(engine)
        steps[f"ZeRO {stage}"] = lessons.steps(engine, lessons.guided(model))
        if stage == task.cfg.pool.zero_stage:
            steps[f"ZeRO {stage}{UNGUIDED}"] = lessons.steps(engine, TrueTokens())
    model = lessons.model()
    local = lessons.local(model)
    alone = lessons.steps(local, lessons.guided(model))
    if world > 1:
        steps[BESIDE] = alone
    else:
        steps[PLAIN + UNGUIDED] = lessons.steps(local, TrueTokens())
    walls: Dict[str, List[float]] = {}
    visits = {name: _together(name, step, task, lessons, walls, range(world)) for name, step in steps.items()}
    reference = _together(PLAIN, alone, task, lessons, walls, range(1))
    for visit in (reference, *visits.values()):
        visit()  # the first steps make moments and buffers
    walls.clear()
    rates = interleave(reference, visits, task.repeats)
    rates[PLAIN] = rates.pop("reference")
    moved, calls = {}, {}
    silent = {BESIDE, *(name for name in steps if name.endswith(UNGUIDED))}
    talking = {name: step for name, step in steps.items() if world > 1 and name not in silent}
    if task.round_steps:
        moved = {name: _bytes_of(step, task.round_steps, lessons.device) for name, step in talking.items()}
        calls = {name: _calls_of(step) for name, step in talking.items()}
    reductions = _reductions(lessons.device, sum(p.numel() for p in lessons.model().parameters())) if world > 1 else []
    for engine in engines:
        engine.close()
    return Ranks(world, rates, {name: Spread.of(found) for name, found in walls.items()}, moved, reductions, calls)


def _together(
    name: str, step: Step, task: Task, lessons: Lessons, walls: Dict[str, List[float]], busy: range
) -> Callable[[], float]:
    """Visits of a way on the busy ranks, while the others wait; a visit returns their CPU-seconds per token."""
    working = torch.distributed.get_rank() in busy

    def visit() -> float:
        torch.distributed.barrier()
        wall, start = time.perf_counter(), clock(lessons.device)
        for _ in range(task.steps if working else 0):
            step()
        spent = torch.tensor([clock(lessons.device) - start if working else 0.0], device=lessons.device)
        torch.distributed.barrier()
        walls.setdefault(name, []).append((time.perf_counter() - wall) / task.steps)
        torch.distributed.all_reduce(spent)
        return float(spent) / (task.steps * lessons.step_tokens * len(busy))

    return visit


def _bytes_of(step: Step, steps: int, device: torch.device) -> float:
    """Bytes that a rank sent and received over sockets in so many steps; the mean over the ranks."""
    torch.distributed.barrier()
    before = sum(socket_bytes())
    for _ in range(steps):
        step()
    torch.distributed.barrier()
    moved = torch.tensor([float(sum(socket_bytes()) - before)], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(moved)
    return float(moved) / torch.distributed.get_world_size()


def _calls_of(step: Step) -> Calls:
    """The collectives of one step, whatever the backend; gloo makes an all-reduce of a reduce-scatter."""
    scatter = 2 if torch.distributed.get_backend() == "gloo" else 1
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    rings = trees = 0.0
    for event in profile.key_averages():
        kind = event.key.removeprefix("c10d::")
        if kind != event.key:
            trees += event.count * kind.startswith("broadcast")
            rings += event.count * (2 * kind.startswith("allreduce") + kind.startswith(("_allgather", "allgather")))
            rings += event.count * scatter * kind.startswith(("_reduce_scatter", "reduce_scatter"))
    return Calls(rings, trees)


def _reductions(device: torch.device, numel: int, repeats: int = 9) -> List[Tuple[float, float]]:
    """Median wall seconds of all-reduces, from a kilobyte to all weights."""
    found = []
    for size in sorted({256, 4096, numel // 16, numel // 4, numel}):
        numbers, times = torch.ones(size, device=device), []
        for _ in range(repeats):
            torch.distributed.barrier()
            start = time.perf_counter()
            torch.distributed.all_reduce(numbers)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        found.append((float(numbers.nbytes), Spread.of(times).median))
    return found


class Lessons:
    """Models, batches and steps of one rank."""

    def __init__(self, task: Task) -> None:
        self.cfg, self.share, self.rank = task.cfg, task.share, torch.distributed.get_rank()
        self.device = resolve_device(task.cfg.compute.device)
        self.vocabulary = build_tokenizer(task.cfg.tokenizer, []).vocab_size
        self.step_tokens = self.share * self.cfg.model.context
        generator = torch.Generator().manual_seed(1 + self.rank)
        size = (self.share, self.cfg.model.context + 1)
        tokens_BS = torch.randint(self.vocabulary, size, generator=generator)
        recent_B = torch.arange(self.share) < round(self.cfg.sleep.recent * self.share)
        self.batch = Batch(tokens_BS, recent_B, np.arange(self.share)).to(self.device)
        self.teacher, self.anchor = self.model(), self.model()

    def model(self) -> NestedLM:
        """A model of the configuration, the same on every rank."""
        model = NestedLM(self.cfg.model, self.cfg.levels, self.vocabulary)
        return model.reset_parameters(self.cfg.run.seed).to(self.device)

    def guided(self, student: NestedLM) -> GuidedObjective:
        """The objective of a round, guides computed anew in every step."""
        sleep = self.cfg.sleep
        guides = (self.teacher if sleep.teacher else None), (self.anchor if sleep.anchor else None)
        return GuidedObjective(sleep, 1, self.cfg.run.seed, student, *guides)

    def steps(self, engine: Steps, objective: Objective) -> Step:
        """Training steps of an engine."""
        lr, precision = self.cfg.sleep.optimizer.lr, self.cfg.compute.precision
        return lambda: training_step(engine, objective, 0, self.batch, lr, precision)

    def local(self, model: NestedLM) -> LocalEngine:
        """An engine without DeepSpeed."""
        return LocalEngine(model, self.cfg.sleep.optimizer)

    def parallel(self) -> Step:
        """Sleep steps without DeepSpeed, gradients averaged over the ranks by torch."""
        model = self.model()
        return self.steps(_Parallel(model, self.cfg.sleep.optimizer), self.guided(model))

    def awake(self) -> Step:
        """Wake steps of the learner, whose log is durable at once."""
        cfg, tokens_BS = self.cfg, self.batch.tokens_BS.cpu().numpy()
        context = cfg.model.context
        rows = [Sequence(i, "random", row, 0, i * context, None, context) for i, row in enumerate(tokens_BS)]
        awake = Awake(self.model(), cfg, Recall(cfg.wake.recall) if cfg.wake.recall else None)
        return lambda: awake.step(rows, lambda records: lambda: None)

    def engine(self, stage: int, model: NestedLM) -> DeepSpeedEngine:
        """The pool's engine with a ZeRO stage."""
        from cluster.pool.engine import DeepSpeedEngine  # noqa: PLC0415 (after the accelerator is chosen)

        pool = replace(self.cfg.pool, zero_stage=stage)
        return DeepSpeedEngine(model, self.cfg.sleep.optimizer, pool, self.share)


class _Parallel(LocalEngine):
    """An engine whose gradients torch averages over the ranks while the backward pass runs."""

    def __init__(self, model: NestedLM, optimizer: OptimizerConfig) -> None:
        super().__init__(model, optimizer)
        self.parallel = nn.parallel.DistributedDataParallel(model)

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        logits_BTV: Tensor = self.parallel(tokens_BT)
        return logits_BTV
