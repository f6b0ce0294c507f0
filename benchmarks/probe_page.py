"""The page of the probe benchmark: accuracies with their spread, recipes, and where which model is ahead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Dict, List, NamedTuple, Tuple

from benchmarks.probe_tasks import Task
from benchmarks.probe_training import Recipe, Run
from benchmarks.tables import Spread, markdown_table
from nl_model.memory.config import MemoryConfig

CLEAR = 0.001
"""Share of right answers by which a model has to lead to be called ahead."""
HEADER = ("task", "split", "model", "mean % (least .. most)", "per seed", "lr", "steps", "published %")
RECIPE_HEADER = (
    "task",
    "tokens",
    "vocabulary",
    "model",
    "parameters",
    "heads",
    "steps at most",
    "batch",
    "training set",
    "lessons first",
    "memories",
)
ABOUT = (
    "Accuracy of small models on fresh test data, by seed; of several learning rates the one that is best "
    "on validation data is shown. Languages and needles count whole sequences. Training ends early when validation "
    "says solved twice. Published figures come from other sizes and other training: they say what to expect in order, "
    "not in value."
)


class Line(NamedTuple):
    """What one model scored on one test split."""

    task: str
    split: str
    model: str
    spread: Spread
    scores: Tuple[float, ...]
    """By seed, in [0, 1]."""
    lr: float
    steps: Spread
    """Optimizer steps taken."""
    run: Run
    """The first seed's, for what is the same in all."""


def table(lines: Sequence[Line], tasks: Mapping[str, Task]) -> List[Tuple[str, ...]]:
    """Rows under HEADER."""
    rows: List[Tuple[str, ...]] = []
    for line in lines:
        published = tasks[line.task].published.get(line.split, {})
        mean, spread = 100 * sum(line.scores) / len(line.scores), line.spread
        rows.append(
            (
                line.task,
                line.split,
                line.model,
                f"{mean:.1f} ({100 * spread.low:.1f} .. {100 * spread.high:.1f})",
                " ".join(f"{100 * score:.1f}" for score in line.scores),
                f"{line.lr:g}",
                line.steps.show(",.0f"),
                ", ".join(f"{who} {figure:g}" for who, figure in published.items()),
            )
        )
    return rows


def ahead(lines: Sequence[Line], model: str) -> List[str]:
    """One sentence per task and split where the model's worst seed beats every other model's best by `CLEAR`."""
    found = []
    cells: Dict[Tuple[str, str], Dict[str, Spread]] = {}
    for line in lines:
        cells.setdefault((line.task, line.split), {})[line.model] = line.spread
    for (task, split), by_model in cells.items():
        others = {name: spread for name, spread in by_model.items() if name != model}
        best = max((spread.high for spread in others.values()), default=1.0)
        if model in by_model and by_model[model].low >= best + CLEAR:
            shown = ", ".join(f"{name} {100 * spread.median:.1f}%" for name, spread in others.items())
            found.append(f"{task} ({split}): {model} {100 * by_model[model].median:.1f}%, {shown}")
    return found


def recipe_rows(lines: Sequence[Line], tasks: Mapping[str, Task]) -> List[Tuple[str, ...]]:
    """How each shown model was trained, under RECIPE_HEADER."""
    rows: List[Tuple[str, ...]] = []
    for (task, model), line in {(line.task, line.model): line for line in lines}.items():
        recipe = tasks[task].recipe_of(model)
        rows.append(
            (
                task,
                str(line.run.tokens),
                str(line.run.vocabulary),
                model,
                f"{line.run.parameters:,}",
                str(recipe.heads),
                f"{recipe.steps:,}",
                str(recipe.batch),
                f"{recipe.examples:,} fixed" if recipe.examples else "fresh",
                "; ".join(recipe.lessons) or "none",
                _memory(recipe),
            )
        )
    return rows


def _memory(recipe: Recipe) -> str:
    """What differs from the defaults of MemoryConfig."""
    if recipe.memory is None:
        return ""
    default = MemoryConfig()
    names = [f.name for f in fields(MemoryConfig) if getattr(recipe.memory, f.name) != getattr(default, f.name)]
    return ", ".join(f"{name} {getattr(recipe.memory, name)}" for name in names) or "defaults"


def render(lines: Sequence[Line], tasks: Mapping[str, Task]) -> str:
    """The page as Markdown."""
    parts = [ABOUT, markdown_table(HEADER, table(lines, tasks))]
    models = list(dict.fromkeys(line.model for line in lines))
    if len(models) > 1:
        parts.append(
            f"A model is ahead where its worst seed beats the best seed of the others by {100 * CLEAR:g} points or "
            "more; medians over seeds are shown."
        )
        for model in models:
            listed = "\n".join(f"* {line}" for line in ahead(lines, model)) or "Nowhere in these runs."
            parts.append(f"### Where {model} is ahead\n\n{listed}")
    parts += ["### Recipes", markdown_table(RECIPE_HEADER, recipe_rows(lines, tasks))]
    return "\n\n".join(parts)
