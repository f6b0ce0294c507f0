"""What a wake step and a sleep step cost beside a plain training step. `python -m benchmarks.wake`.

All three run the same model on the same batches, interleaved, on the CPU with one thread. They are the steps that a run
takes: the learner's, and the training step with the objective of a round or with true tokens alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.tables import Spread, markdown_table
from nl_model.flops import forward_flops, full_step_flops, wake_step_flops
from nl_model.model import NestedLM
from nl_model.recall import Recall
from pipelines.config.load import load_config
from pipelines.config.schema import Config
from pipelines.data.stream import Sequence
from pipelines.data.tokens import build_tokenizer
from pipelines.experience import Record
from pipelines.sleep.base import TrueTokens
from pipelines.sleep.engine import LocalEngine
from pipelines.sleep.objective import GuidedObjective
from pipelines.sleep.training import Batch, Objective, training_step
from pipelines.wake.awake import Awake

LARGER = (
    "model.dim=256",
    "model.blocks=8",
    "model.heads=8",
    "levels.fast.width=512",
    "levels.medium.width=512",
    "levels.slow.width=1024",
)
"""The default configuration's proportions with about 13 times the parameters."""
ALONE = "wake, no recall"
WARM_UP = 4
"""Plain steps before the clock starts; they also bring the weights, neutral at first, to where gradients flow."""

Step = Callable[[int], object]
"""Takes step i, counted from the first one, on batch i."""


@dataclass(frozen=True)
class Cost:
    """What one kind of step costs over all repeats."""

    cpu_ms: Spread
    """CPU milliseconds per step, of the whole process."""
    wall_ms: Spread
    tokens_per_s: Spread
    """Tokens per second of wall time."""
    cpu_ratio: Spread
    """CPU time by that of the plain step, repeat by repeat."""
    speed_ratio: Spread
    """Tokens per second by those of the plain step, repeat by repeat."""
    flops_ratio: float
    """FLOPs by those of the plain step, as nl_model.flops counts them."""


@dataclass(frozen=True)
class StepFigures:
    """Costs of "plain", "wake", "sleep" steps and of wake steps without recall (`ALONE`), of one model."""

    parameters: int
    learner_parameters: int
    """Of these, parameters that wake writes."""
    step_tokens: int
    steps: int
    """Steps of each kind per repeat, as many as every level of the learner needs to come due."""
    repeats: int
    costs: dict[str, Cost]


def default_configs() -> dict[str, Config]:
    """The configurations that are measured unless others are given."""
    return {"default": load_config("default"), "larger": load_config("default", LARGER)}


def measure(repeats: int = 7, configs: Mapping[str, Config] | None = None) -> dict[str, StepFigures]:
    """Costs of the steps of every configuration: medians, least and most over interleaved repeats.

    The wake step scores, reads with recall as configured, builds the records, takes the gradient and writes what is
    due; its log is durable at once, and its FLOPs are the model's alone. The sleep step is that of a pool of one rank
    without DeepSpeed: student, teacher and anchor. ValueError for repeats < 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    with _one_thread():
        return {name: _measure(cfg, repeats) for name, cfg in (configs or default_configs()).items()}


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _measure(cfg: Config, repeats: int) -> StepFigures:
    vocabulary = build_tokenizer(cfg.tokenizer, []).vocab_size
    step_tokens = cfg.wake.batch * cfg.model.context
    steps = max(level.period for level in cfg.levels.values() if level.owner == "learner") // step_tokens
    batches = _batches(cfg, vocabulary, steps)
    weights = _warm_weights(cfg, vocabulary, batches)
    model = _model(cfg, vocabulary, weights)
    kinds = {"plain": _plain(cfg, model, batches)}
    kinds["wake"] = _wake(cfg, _model(cfg, vocabulary, weights), batches, cfg.wake.recall)
    kinds[ALONE] = _wake(cfg, _model(cfg, vocabulary, weights), batches, 0)
    kinds["sleep"] = _sleep(cfg, [_model(cfg, vocabulary, weights) for _ in range(3)], batches)
    cpu: dict[str, list[float]] = {kind: [] for kind in kinds}
    wall: dict[str, list[float]] = {kind: [] for kind in kinds}
    order = list(kinds)
    for repeat in range(repeats + 1):
        order = [*order[1:], order[0]]  # none of them always runs behind the same other one
        for kind in order:
            spent = _time(kinds[kind], steps)
            if repeat:  # the first round makes optimizer state and warms the caches up
                cpu[kind].append(spent[0] / steps)
                wall[kind].append(spent[1] / steps)
    ratios = flops_ratios(cfg, vocabulary)
    costs = {kind: _cost(cpu, wall, kind, step_tokens, ratios[kind]) for kind in kinds}
    sizes = model.level_sizes()
    learner = sum(sizes[name] for name, level in cfg.levels.items() if level.owner == "learner")
    return StepFigures(sum(sizes.values()), learner, step_tokens, steps, repeats, costs)


def flops_ratios(cfg: Config, vocab_size: int) -> dict[str, float]:
    """FLOPs per token of each kind of step by those of a plain one."""
    shape = (cfg.model, cfg.levels, vocab_size)
    full, recent = full_step_flops(*shape), round(cfg.sleep.recent * cfg.sleep.batch) / cfg.sleep.batch
    guided = recent * bool(cfg.sleep.teacher) + (1 - recent) * bool(cfg.sleep.anchor)
    return {
        "plain": 1.0,
        **dict.fromkeys(("wake", ALONE), wake_step_flops(*shape) / full),
        "sleep": (full + guided * forward_flops(*shape)) / full,
    }


def _batches(cfg: Config, vocabulary: int, steps: int) -> list[list[Sequence]]:
    """Random tokens: what they say does not change what a step costs."""
    rng, size, context = np.random.default_rng(cfg.run.seed), cfg.wake.batch, cfg.model.context
    tokens = rng.integers(0, vocabulary, (steps * size, context + 1)).astype(np.uint32)
    rows = [Sequence(key, "random", row, 0, key * context, None, context) for key, row in enumerate(tokens)]
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def _warm_weights(cfg: Config, vocabulary: int, batches: list[list[Sequence]]) -> dict[str, torch.Tensor]:
    model = NestedLM(cfg.model, cfg.levels, vocabulary).reset_parameters(cfg.run.seed)
    step = _plain(cfg, model, batches)
    for i in range(WARM_UP):
        step(i)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _model(cfg: Config, vocabulary: int, weights: dict[str, torch.Tensor]) -> NestedLM:
    model = NestedLM(cfg.model, cfg.levels, vocabulary)
    model.load_state_dict(weights)
    return model


def _plain(cfg: Config, model: NestedLM, batches: list[list[Sequence]]) -> Step:
    return _training(cfg, model, TrueTokens(), batches)


def _training(cfg: Config, model: NestedLM, objective: Objective, batches: list[list[Sequence]]) -> Step:
    """The pool's training step in this process; who guides decides what it is a step of."""
    engine, lr = LocalEngine(model, cfg.sleep.optimizer), cfg.sleep.optimizer.lr
    held = [_batch(cfg, batch) for batch in batches]
    return lambda i: training_step(engine, objective, i, held[i % len(held)], lr, cfg.compute.precision)


def _batch(cfg: Config, sequences: list[Sequence]) -> Batch:
    """Sequences as the pool has them: recent ones first, the rest stands for replayed ones."""
    tokens_BS = torch.from_numpy(np.stack([sequence.tokens for sequence in sequences]).astype(np.int64))
    recent_B = torch.arange(len(tokens_BS)) < round(cfg.sleep.recent * len(tokens_BS))
    return Batch(tokens_BS, recent_B, np.array([sequence.key for sequence in sequences]))


def _wake(cfg: Config, model: NestedLM, batches: list[list[Sequence]], recall: int) -> Step:
    awake = Awake(model, cfg, Recall(recall) if recall else None)
    return lambda i: awake.step(batches[i % len(batches)], _durable_at_once)


def _durable_at_once(records: list[Record]) -> Callable[[], None]:
    return lambda: None


def _sleep(cfg: Config, models: list[NestedLM], batches: list[list[Sequence]]) -> Step:
    student, awake, at_rest = models
    teacher, anchor = (awake if cfg.sleep.teacher else None), (at_rest if cfg.sleep.anchor else None)
    objective = GuidedObjective(cfg.sleep, len(batches), cfg.run.seed, student, teacher, anchor)
    return _training(cfg, student, objective, batches)


def _time(step: Step, steps: int) -> tuple[float, float]:
    """CPU and wall seconds of some steps."""
    cpu, wall = time.process_time(), time.perf_counter()
    for i in range(steps):
        step(i)
    return time.process_time() - cpu, time.perf_counter() - wall


def _cost(
    cpu: Mapping[str, list[float]], wall: Mapping[str, list[float]], kind: str, tokens: int, flops_ratio: float
) -> Cost:
    return Cost(
        cpu_ms=Spread.of(1000 * seconds for seconds in cpu[kind]),
        wall_ms=Spread.of(1000 * seconds for seconds in wall[kind]),
        tokens_per_s=Spread.of(tokens / seconds for seconds in wall[kind]),
        cpu_ratio=Spread.of_ratios(cpu[kind], cpu["plain"]),
        speed_ratio=Spread.of_ratios(wall["plain"], wall[kind]),
        flops_ratio=flops_ratio,
    )


def render(measured: Mapping[str, StepFigures]) -> str:
    """Markdown: one table per configuration."""
    header = ["step", "CPU ms", "wall ms", "tokens/s", "CPU / plain", "FLOPs / plain", "tokens/s / plain"]
    parts = []
    for name, figures in measured.items():
        rows = [
            [
                kind,
                cost.cpu_ms.show(".1f"),
                cost.wall_ms.show(".1f"),
                cost.tokens_per_s.show(",.0f"),
                cost.cpu_ratio.show(".2f"),
                f"{cost.flops_ratio:.2f}",
                cost.speed_ratio.show(".2f"),
            ]
            for kind, cost in figures.costs.items()
        ]
        share = figures.learner_parameters / figures.parameters
        about = (
            f"**{name}**: {figures.parameters:,} parameters, {share:.0%} of them written awake; steps of "
            f"{figures.step_tokens:,} tokens; {figures.repeats} repeats of {figures.steps} steps of each kind."
        )
        parts += [about, markdown_table(header, rows)]
    return "\n\n".join(parts)


def main() -> None:
    """Measure and print the tables."""
    print(render(measure()))


if __name__ == "__main__":
    main()
