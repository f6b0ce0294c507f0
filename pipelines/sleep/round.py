"""A round, stage by stage: open the models, dream, set the task, train, make the candidate.

What a round is a function of is `Pinned`; where it runs is a `Host` (a rank of the pool, or one process). Nothing here
knows of Ray, DeepSpeed or files. Shapes: B sequences, S stored tokens (context + 1).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Optional, Protocol

import numpy as np
import torch
from torch import Tensor

from nl_model.config import OptimizerConfig
from nl_model.flops import forward_flops, write_flops
from nl_model.losses import token_nll
from nl_model.model import NestedLM, autocast
from nl_model.weights import load_into
from pipelines.config.schema import Config
from pipelines.config.sleep import SleepConfig
from pipelines.experience.replay import Experience
from pipelines.machine.replan import adjusted
from pipelines.sleep.average import WeightAverage
from pipelines.sleep.batches import RoundBatches
from pipelines.sleep.engine import Engine, HeldState, TrainingState
from pipelines.sleep.guides import StoredGuides
from pipelines.sleep.losses import merge_weights
from pipelines.sleep.objective import GuidedObjective
from pipelines.sleep.plan import RoundPlan
from pipelines.sleep.schedule import Schedule
from pipelines.sleep.student import Expansion, expand, folded, receivers_due, student_step_flops
from pipelines.sleep.training import Batch, Place, Progress, train

Weights = Dict[str, Tensor]
"""Tensors by parameter name."""


@dataclass(frozen=True)
class Pinned:
    """Everything a round is a function of, opened."""

    plan: RoundPlan
    experience: Experience
    """Version of the store that the plan names, or a later one: keys decide what counts."""
    weights: Weights
    """Of the anchor: the live release at rest."""
    offset: Weights
    """Its offset of the parameters that the learner writes (docs/ARCHITECTURE.md, rebasing)."""
    unshifted: Weights
    """The learner's own weights, without offsets, as the mark pinned them."""
    trainer: Optional[TrainingState] = None
    """What the round that made the anchor left behind (sleep.carry); None: nothing, or it is lost."""


@dataclass(frozen=True)
class DreamShare:
    """What one rank has of the dreams of a round."""

    tokens: Optional[np.ndarray] = None
    """int64 (dreams, S); None where dreaming is off."""
    record: Optional[Dict[str, Any]] = None
    """Rank 0: what the round's record says of them."""
    passes: float = 0.0
    """Rank 0: their cost in forward passes over one token."""


@dataclass(frozen=True)
class Resume:
    """Where an earlier attempt of the same round stands."""

    state: TrainingState
    progress: Progress
    trained_tokens: int = 0
    forward_tokens: int = 0
    average: Weights = field(default_factory=dict)
    """Average of the weights so far; empty without one."""


class Host(Protocol):
    """Where a round runs: one rank of the pool, or a process alone."""

    cfg: Config
    place: Place
    device: torch.device

    def build_model(self) -> NestedLM:
        """A model of the run's shape on the device, its weights to be loaded."""

    def build_engine(
        self,
        model: NestedLM,
        optimizer: OptimizerConfig,
        batch: int,
        frozen: Iterable[str],
        state: Optional[TrainingState],
    ) -> Engine:
        """An engine over a model; batch: sequences per step over all ranks."""

    def dream(self, pinned: Pinned, awake: NestedLM) -> DreamShare:
        """This round's dreams, the same on all ranks. A collective."""

    def store_guides(self, pinned: Pinned, rows: np.ndarray, teacher: NestedLM) -> tuple[StoredGuides, int]:
        """The teacher's guides of some rows, and the tokens that this rank read for them. A collective."""

    def resume(self, plan: RoundPlan) -> Optional[Resume]:
        """Where an earlier attempt stands. A collective."""

    def after_step(self, engine: Engine, task: Task, progress: Progress, loss: float) -> None:
        """Called after every step: progress to show, states to keep. A collective."""


@dataclass
class Task:
    """What is trained in a round, on what, how."""

    plan: RoundPlan
    cfg: SleepConfig
    """As the plan scales it."""
    student: NestedLM
    batches: RoundBatches
    objective: GuidedObjective
    schedule: Schedule
    expansion: Expansion
    average: Optional[WeightAverage]
    state: Optional[TrainingState]
    """What the engine takes its moments from."""
    progress: Progress
    step_flops: int
    """FLOPs per token that the student trains on."""
    trainer: str
    """continued: goes on from what the last round left; resumed: from an earlier attempt; cold: from neither."""


@dataclass(frozen=True)
class Models:
    """The three models of a round."""

    student: NestedLM
    awake: NestedLM
    """The teacher of recent experience: what the learner was at the mark."""
    anchor: NestedLM
    """The teacher of old experience: the live release at rest."""


@dataclass(frozen=True)
class Candidate:
    """What a round made, before anyone judged it."""

    weights: Weights
    """float32 on the CPU: what the release will be."""
    offset: Weights
    """Its offset of the learner's parameters."""
    models: Models
    recent_sources: List[str]
    """Sources of the round's recent experience."""
    last: Batch
    """This rank's share of the last batch."""
    ending: Optional[float]
    """The student's loss on it when training had ended, nats per token; None where the candidate is not the student
    as it was trained last (averages, merges), or nothing was trained."""
    loss: Dict[str, float]
    """Means over the last fifth of the steps, on this rank's share."""
    steps: int
    resumed_at: int
    """Steps that an earlier attempt had done."""
    flops: float
    """Of this rank, passes of guides and dreams included."""
    optimizer_bytes: int
    dreams: Optional[Dict[str, Any]]
    """Rank 0: what was dreamt, as the round's record keeps it."""
    trainer: str
    """See `Task`."""
    left: Optional[HeldState] = None
    """What the next round may carry on, where the host keeps it in memory."""


def run_round(pinned: Pinned, host: Host, keep: Optional[Keeper] = None) -> Candidate:
    """One round, from what is pinned to a candidate.

    Args:
        keep: takes over what the next round may carry on, while the engine is still there.
    """
    models = open_models(pinned, host)
    dreams = host.dream(pinned, models.awake)
    task = set_task(pinned, host, models, dreams)
    if not task.schedule.steps:
        return _untrained(pinned, task, models, host)
    return _trained(pinned, task, models, dreams, host, keep)


class Keeper(Protocol):
    """Keeps what the next round carries on."""

    def __call__(self, engine: Engine, steps: int) -> Optional[HeldState]:
        """Keep an engine's state; returned where it is held in memory. A collective."""


def open_models(pinned: Pinned, host: Host) -> Models:
    """Student and awake model as the learner was at the mark, the anchor at rest.

    A trainer that carries on has read, or will read, all that the learner wrote: its student starts at its own weights,
    or at the release's where it left none.
    """
    student, awake, anchor = host.build_model(), host.build_model(), host.build_model()
    load_into(anchor, pinned.weights)
    as_awake = {**pinned.weights, **{n: u + pinned.offset[n] for n, u in pinned.unshifted.items()}}
    load_into(awake, as_awake)
    carries = host.cfg.sleep.carry == "trainer"
    own = pinned.trainer.weights() if carries and pinned.trainer is not None else {}
    load_into(student, (own or pinned.weights) if carries and pinned.plan.steps else as_awake)
    return Models(student, awake, anchor)


def set_task(pinned: Pinned, host: Host, models: Models, dreams: DreamShare) -> Task:
    """What is trained on what: batches, objective, schedule, and where an earlier attempt left off."""
    cfg, plan, student = host.cfg, pinned.plan, models.student
    sleep = adjusted(cfg.sleep, plan.recent_scale, plan.lr_scale)
    batches = RoundBatches(pinned.experience, plan, sleep, dreams.tokens, cfg.dreams)
    receivers = receivers_due(cfg.levels, plan.first_key * cfg.model.context, plan.tokens)
    expansion = expand(student, receivers, sleep, plan.seed)
    teacher = models.awake if sleep.teacher else None
    anchor = models.anchor if sleep.anchor else None
    objective = GuidedObjective(sleep, plan.steps, plan.seed, student, teacher, anchor)
    resume = host.resume(plan) if plan.steps else None
    average = WeightAverage(pinned.weights, sleep.average, sleep.average_every) if sleep.average else None
    if teacher is not None and sleep.guide == "stored" and plan.steps:
        rows = batches.visited(plan.steps)
        objective.stored, objective.forward_tokens = host.store_guides(pinned, rows, teacher)
    state = pinned.trainer if sleep.carry != "nothing" else None
    progress, how = Progress(), "continued" if state is not None else "cold"
    if resume is not None:
        state, progress, how = resume.state, resume.progress, "resumed"
        load_into(student, resume.state.weights())
        objective.trained_tokens, objective.forward_tokens = resume.trained_tokens, resume.forward_tokens
        if average is not None and resume.average:
            average.weights = {name: tensor.clone() for name, tensor in resume.average.items()}
    schedule = Schedule.of_round(sleep, plan.steps, plan.trained_steps if sleep.carry == "trainer" else 0)
    flops = student_step_flops(student, expansion, sleep)
    return Task(plan, sleep, student, batches, objective, schedule, expansion, average, state, progress, flops, how)


def _trained(
    pinned: Pinned, task: Task, models: Models, dreams: DreamShare, host: Host, keep: Optional[Keeper]
) -> Candidate:
    cfg, sleep, objective, resumed_at = host.cfg, task.cfg, task.objective, task.progress.step
    engine = host.build_engine(task.student, sleep.optimizer, sleep.batch, task.expansion.frozen, task.state)
    progress = train(
        engine,
        objective,
        task.batches,
        task.schedule,
        host.device,
        precision=cfg.compute.precision,
        place=host.place,
        progress=task.progress,
        average=task.average,
        after=lambda progress, loss: host.after_step(engine, task, progress, loss),
    )
    last = task.batches.batch(task.schedule.steps - 1, host.place).to(host.device)
    whole = task.average is None and not sleep.merge  # the engine's weights become the candidate as they are
    ending = mean_loss(engine, last.tokens_BS, cfg.compute.precision) if whole else None
    weights = task.average.weights if task.average is not None else dict(engine.weights())
    optimizer_bytes = engine.optimizer_bytes()
    left = keep(engine, task.schedule.steps) if keep is not None and sleep.carry != "nothing" else None
    engine.close()
    loss = progress.loss
    if sleep.mode == "slots":
        plain, tokens = host.build_model(), task.batches.batch(0).tokens_BS[:, :-1].to(host.device)
        loss["fold"] = folded(plain, weights, task.expansion, sleep, task.plan.seed, tokens).divergence or 0.0
        weights = {name: p.detach().cpu() for name, p in plain.named_parameters()}
    if sleep.merge:
        weights = merge_weights(weights, pinned.weights, sleep.merge)
    forward = forward_flops(cfg.model, cfg.levels, models.anchor.vocab_size)
    read = objective.forward_tokens + dreams.passes
    # Every rank writes its part of the matrices: one write in all.
    written = task.schedule.steps * write_flops(cfg.model, cfg.levels, models.anchor.vocab_size, sleep.optimizer)
    return Candidate(
        weights=weights,
        offset={name: weights[name] - u for name, u in pinned.unshifted.items()},
        models=models,
        recent_sources=task.batches.recent_sources(),
        last=last,
        ending=ending,
        loss=loss,
        steps=task.schedule.steps,
        resumed_at=resumed_at,
        flops=float(objective.trained_tokens * task.step_flops + read * forward) + written / host.place.world,
        optimizer_bytes=optimizer_bytes,
        dreams=dreams.record,
        trainer=task.trainer,
        left=left,
    )


def _untrained(pinned: Pinned, task: Task, models: Models, host: Host) -> Candidate:
    """A round that trains nothing publishes what the learner is: where the learner itself trains every level."""
    weights = {name: p.detach().cpu().clone() for name, p in models.awake.named_parameters()}
    return Candidate(
        weights=weights,
        offset={name: weights[name] - u for name, u in pinned.unshifted.items()},
        models=models,
        recent_sources=task.batches.recent_sources(),
        last=task.batches.batch(0, host.place).to(host.device),
        ending=None,
        loss={},
        steps=0,
        resumed_at=0,
        flops=0.0,
        optimizer_bytes=0,
        dreams=None,
        trainer="none",
    )


@torch.no_grad()
def mean_loss(model: Any, tokens_BS: Tensor, precision: str) -> float:
    """Mean loss of a model, or of an engine, on a batch in nats per token."""
    with autocast(tokens_BS.device, precision):
        return float(token_nll(model(tokens_BS[:, :-1]), tokens_BS[:, 1:]).mean())
