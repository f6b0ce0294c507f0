"""Small models trained side by side on a probe: who builds them, how they are trained, how they are scored.

Shapes: B batch, T tokens, D model width, V vocabulary, N scored positions of a batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Dict, Tuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nl_model.config import LevelConfig, ModelConfig, OptimizerConfig
from nl_model.memory.config import MemoryConfig
from nl_model.model import NestedLM
from nl_model.probes import IGNORE, Probe, stream
from pipelines.sleep.engine import LocalEngine
from pipelines.sleep.training import Batch, training_step

MODELS: Dict[str, Dict[str, Any]] = {"attention": {}, "hope": {"mixer": "titans"}}
"""Model name to the fields of ModelConfig that make it; everything else is the recipe's."""

TEST_SEED = 1_000_003
"""Every model and seed of training answers the same questions."""

ZERO_GAIN = 0.5
"""Gain of matrices that a NestedLM starts at zero."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained on a probe."""

    dim: int = 64
    """Width of the residual stream."""
    blocks: int = 2
    """Decoder blocks, each with one MLP."""
    mlp: int = 1
    """Hidden units of a block's MLP per unit of width."""
    heads: int = 1
    """Heads per block. Queries and keys have unit scale, so narrow heads cannot attend sharply: keep them wide."""
    steps: int = 2000
    """Optimizer steps; the learning rate warms up, stays through the lessons and follows a cosine after them."""
    batch: int = 32
    """Sequences per step."""
    lrs: Tuple[float, ...] = (3e-3,)
    """Learning rates to try; the one with the best validation score is reported."""
    weight_decay: float = 0.1
    """Decoupled, on every parameter."""
    warmup: float = 0.05
    """Share of the steps during which the learning rate rises."""
    examples: int = 0
    """Size of a fixed training set; 0: every batch is fresh."""
    test: int = 1000
    """Sequences per test split."""
    validation: int = 256
    """Sequences that choose the learning rate and say when a task is solved."""
    checks: int = 20
    """How often in a run validation looks, lessons excepted."""
    lesson_share: float = 0.5
    """Share of the steps that a task's lessons take, one after the other."""
    lessons: Tuple[str, ...] = ()
    """Names of easier probes that come first, in order."""
    solved: float = 0.995
    """Validation score from which on a task counts as solved."""
    patience: int = 2
    """Solved looks in a row that end a run; 0: every step is taken, which hardens what longer tests ask for."""
    memory: MemoryConfig | None = None
    """Rule and chunks of self-modifying memories, for models that have them."""

    def __post_init__(self) -> None:
        if not self.lrs or min(self.lrs) <= 0:
            raise ValueError(f"lrs={self.lrs} must hold at least one positive learning rate")
        for key in ("mlp", "steps", "batch", "test", "validation", "checks"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if not 0 < self.solved <= 1:
            raise ValueError(f"solved={self.solved} must lie in (0, 1]")
        if not 0 <= self.lesson_share <= 1:
            raise ValueError(f"lesson_share={self.lesson_share} must lie in [0, 1]")


@dataclass(frozen=True)
class Run:
    """One trained model and what it scored."""

    lr: float
    seed: int
    accuracy: Dict[str, float]
    """Score per test split, in [0, 1]."""
    validation: float
    """Score on validation data at the end."""
    loss: float
    """Mean training loss of the last tenth of the steps, nats per scored position."""
    steps: int
    """Optimizer steps taken."""
    seconds: float
    """CPU time of training."""
    parameters: int
    stopped: str
    """Why training ended: steps, solved or budget."""
    tokens: int
    """Length of the longest test sequence."""
    vocabulary: int


class Answerer(nn.Module):
    """A language model that answers the scored positions of a probe only: (B, T) tokens -> (N, V) logits.

    With readout "last" an MLP answers every position from the last output and a learned embedding of the position.
    """

    def __init__(self, body: NestedLM, readout: str, seed: int) -> None:
        super().__init__()
        self.head, self.readout = body.head, readout
        self.body = body
        body.head = nn.Identity()  # type: ignore[assignment]  # outputs of unscored positions are never projected
        if readout == "last":
            dim, generator = body.cfg.dim, torch.Generator().manual_seed(seed)
            self.position = nn.Embedding(body.cfg.context, dim)
            self.mlp = nn.Sequential(nn.Linear(2 * dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))
            with torch.no_grad():
                for parameter in (*self.position.parameters(), *self.mlp.parameters()):
                    std = parameter.size(1) ** -0.5 if parameter.dim() == 2 else 0.0
                    parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))

    def forward(self, tokens_BT: Tensor, scored_BT: Tensor) -> Tensor:
        """Logits of the scored positions, row by row."""
        x_BTD = self.body(tokens_BT)
        if self.readout == "last":
            last_BTD = x_BTD[:, -1:].expand_as(x_BTD)
            x_BTD = self.mlp(torch.cat((last_BTD, self.position.weight[: x_BTD.size(1)].expand_as(x_BTD)), dim=-1))
        return self.head(x_BTD[scored_BT])


@dataclass(frozen=True)
class Answers:
    """The objective of one batch: the scored positions alone count."""

    net: Answerer
    targets_BT: Tensor

    def loss(self, step: int, forward: Callable[[Tensor], Tensor], batch: Batch) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Mean loss in nats per scored position."""
        scored_BT = self.targets_BT != IGNORE
        logits_NV = self.net(batch.tokens_BS, scored_BT)  # `forward` would answer every position
        return F.cross_entropy(logits_NV.float(), self.targets_BT[scored_BT]), {}


def build(name: str, vocab_size: int, cfg: ModelConfig, seed: int, mlp: int = 4) -> NestedLM:
    """A fresh model of MODELS with one MLP of hidden width mlp * dim per block; ValueError for an unknown name."""
    if name not in MODELS:
        raise ValueError(f"model={name!r} is unknown; use one of {', '.join(MODELS)}")
    # Trained in full, so it does not matter which level a block's MLP belongs to.
    below = ",".join(map(str, range(cfg.blocks - 1)))
    levels = {
        "fast": LevelConfig(period=1, width=mlp * cfg.dim, blocks=str(cfg.blocks - 1)),
        "slow": LevelConfig(period=2, width=mlp * cfg.dim, blocks=below, owner="pool"),
    }
    model = NestedLM(replace(cfg, **MODELS[name]), levels, vocab_size).reset_parameters(seed)
    draw_zeros(model, seed)
    return model


def draw_zeros(model: NestedLM, seed: int) -> None:
    """Draw the matrices that start at zero: neutral starts suit growing models, but delay recall in small ones.

    The head starts as the embedding, scaled, so that a copied token is the answer from the first step on.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.head.weight.copy_(model.embedding.weight * model.cfg.dim**-0.5)
        for parameter in model.parameters():
            if parameter.dim() == 2 and not parameter.any():
                std = ZERO_GAIN * parameter.size(1) ** -0.5
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


class Batches:
    """Batches of one split, fresh ones or from a fixed set; also remembers how long the longest sequence is."""

    def __init__(self, probe: Probe, split: str, seed: int, batch: int, examples: int, device: torch.device) -> None:
        self.probe, self.split, self.batch, self.device = probe, split, batch, device
        self.rng = stream(seed, split)
        self.fixed = probe.sample(self.rng, examples, split) if examples else None

    def draw(self) -> Tuple[Tensor, Tensor]:
        """Inputs and targets, int64 (B, T)."""
        if self.fixed is None:
            inputs, targets = self.probe.sample(self.rng, self.batch, self.split)
        else:
            rows = self.rng.integers(0, len(self.fixed[0]), self.batch)
            inputs, targets = self.fixed[0][rows], self.fixed[1][rows]
        return torch.from_numpy(inputs).to(self.device), torch.from_numpy(targets).to(self.device)


def train(
    probe: Probe,
    model: str,
    recipe: Recipe,
    lr: float,
    seed: int,
    budget: float,
    device: torch.device,
    lessons: Sequence[Probe] = (),
) -> Run:
    """Train one fresh model for at most `budget` CPU seconds (0: no limit) and score it on every test split.

    `lessons` are easier probes over the same tokens; they come first, in order.
    """
    tests = {split: probe.sample(stream(TEST_SEED, split), recipe.test, split) for split in probe.splits[1:]}
    courses = [Batches(lesson, "train", seed, recipe.batch, 0, device) for lesson in lessons]
    courses.append(Batches(probe, "train", seed, recipe.batch, recipe.examples, device))
    validation = probe.sample(stream(seed, "validation"), recipe.validation, "train")
    context = max(inputs.shape[1] for inputs, _ in (*tests.values(), validation))
    cfg = ModelConfig(
        dim=recipe.dim,
        blocks=recipe.blocks,
        heads=recipe.heads,
        context=context,
        memory=recipe.memory or MemoryConfig(),
    )
    body = build(model, probe.vocab_size, cfg, seed, recipe.mlp)
    net = Answerer(body, probe.readout, seed).to(device)
    engine = LocalEngine(net, OptimizerConfig(lr=lr, beta2=0.98, weight_decay=recipe.weight_decay))  # type: ignore[arg-type]
    losses, solved, stopped, started, step = [], 0, "steps", time.process_time(), 0
    for step in range(1, recipe.steps + 1):
        course = courses[_lesson(step, len(lessons), recipe)]
        inputs_BT, targets_BT = course.draw()
        batch = Batch(inputs_BT, torch.ones(len(inputs_BT), dtype=torch.bool), np.arange(len(inputs_BT)))
        found = training_step(engine, Answers(net, targets_BT), step, batch, lr * _rate(step - 1, recipe))
        losses.append(found["total"])
        if step % math.ceil(recipe.steps / recipe.checks) == 0 and course is courses[-1]:
            solved = solved + 1 if accuracy(net, probe, *validation, device) >= recipe.solved else 0
        if recipe.patience and solved == recipe.patience:
            stopped = "solved"
            break
        if budget and time.process_time() - started > budget:
            stopped = "budget"
            break
    seconds = time.process_time() - started
    scores = {split: accuracy(net, probe, *sample, device) for split, sample in tests.items()}
    return Run(
        lr=lr,
        seed=seed,
        accuracy=scores,
        validation=accuracy(net, probe, *validation, device),
        loss=float(np.mean(losses[-max(1, step // 10) :])),
        steps=step,
        seconds=round(seconds, 1),
        parameters=sum(p.numel() for p in net.parameters()),
        stopped=stopped,
        tokens=max(inputs.shape[1] for inputs, _ in tests.values()),
        vocabulary=probe.vocab_size,
    )


def _lesson(step: int, lessons: int, recipe: Recipe) -> int:
    """Number of the lesson at a step, from 1; `lessons` itself stands for the task."""
    return min(lessons, int(lessons * (step - 1) / max(1.0, recipe.lesson_share * recipe.steps)))


def _rate(step: int, recipe: Recipe) -> float:
    """Share of the learning rate: linear warm-up, full until the lessons are over, then a cosine down to zero."""
    warm = max(1, round(recipe.warmup * recipe.steps))
    if step < warm:
        return (step + 1) / warm
    full = max(warm, round(recipe.lesson_share * recipe.steps)) if recipe.lessons else warm
    return 0.5 * (1 + math.cos(math.pi * max(0, step - full) / max(1, recipe.steps - full)))


@torch.no_grad()
def accuracy(
    net: Answerer, probe: Probe, inputs: np.ndarray, targets: np.ndarray, device: torch.device, batch: int = 128
) -> float:
    """Score in [0, 1] as the probe counts: per scored position, or per sequence without a wrong answer."""
    right = total = 0
    for at in range(0, len(inputs), batch):
        wanted_BT = torch.from_numpy(targets[at : at + batch]).to(device)
        scored_BT = wanted_BT != IGNORE
        answers_N = net(torch.from_numpy(inputs[at : at + batch]).to(device), scored_BT).argmax(-1)
        wrong_BT = torch.zeros_like(scored_BT)
        wrong_BT[scored_BT] = answers_N != wanted_BT[scored_BT]
        if probe.score == "sequence":
            right += int((~wrong_BT.any(1)).sum())
            total += len(wanted_BT)
        else:
            total += int(scored_BT.sum())
            right += int(scored_BT.sum() - wrong_BT.sum())
    return right / total
