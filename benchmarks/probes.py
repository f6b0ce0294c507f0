"""Memory probes: small models side by side, accuracy per seed, published figures beside them.

`python -m benchmarks.probes [--tasks mqar,parity] [--models attention] [--seeds N] [--budget SECONDS] [--json FILE]`
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Dict, List

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.probe_page import HEADER, Line, render, table
from benchmarks.probe_tasks import TASKS, Task, Texts, lessons
from benchmarks.probe_training import MODELS, Recipe, Run, train
from benchmarks.results import keep_page
from benchmarks.tables import Machine, Spread
from nl_model.model import resolve_device
from nl_model.weights import write_durably
from pipelines.report.versions import versions


class Store:
    """Finished runs in a JSON file; a run is kept only as long as its recipe and its budget are the asked ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: Dict[str, Dict[str, Any]] = json.loads(path.read_text())["runs"] if path.is_file() else {}

    def find(self, key: str, recipe: Recipe, budget: float | None = None) -> Run | None:
        """The finished run of this key, if it was trained as asked; one that a budget ended counts for it alone.

        Without a budget every run that was trained by this recipe counts.
        """
        entry = self.runs.get(key)
        if entry is None or entry["recipe"] != _plain(recipe):
            return None
        run = Run(**entry["run"])
        return run if budget is None or run.stopped != "budget" or entry["budget"] == budget else None

    def keep(self, key: str, recipe: Recipe, budget: float, run: Run) -> None:
        """Add a run and write the file."""
        self.runs[key] = {"recipe": _plain(recipe), "budget": budget, "run": asdict(run)}
        about = {"written": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}
        payload = {**about, "machine": Machine.here().show(), "runs": self.runs}
        write_durably(self.path, (json.dumps(payload, indent=1) + "\n").encode())


def _plain(recipe: Recipe) -> Any:
    """A recipe as it comes back from JSON."""
    return json.loads(json.dumps(asdict(recipe)))


def measure(
    tasks: Mapping[str, Task],
    models: Sequence[str],
    seeds: int,
    budget: float,
    store: Store,
    texts: Texts,
    device: torch.device,
    console: Console,
    finished: Callable[[], None] = lambda: None,
) -> None:
    """Train what the store does not hold yet; `finished` is called whenever a task is done."""
    for name, task in tasks.items():
        probe = task.build(texts)
        for model, seed in itertools.product(models, range(seeds)):
            recipe = task.recipe_of(model)
            for lr in recipe.lrs:
                key = cell(name, model, lr, seed)
                if store.find(key, recipe, budget) is None:
                    run = train(probe, model, recipe, lr, seed, budget, device, lessons(recipe))
                    store.keep(key, recipe, budget, run)
                    console.print(_progress(key, run), highlight=False)
        finished()


def cell(task: str, model: str, lr: float, seed: int) -> str:
    """Key of one run."""
    return f"{task}/{model}/{lr:g}/{seed}"


def _progress(key: str, run: Run) -> str:
    scores = ", ".join(f"{split} {score:.1%}" for split, score in run.accuracy.items())
    return f"{key}: {scores} after {run.steps} steps, {run.seconds:.0f} s ({run.stopped})"


def collect(store: Store, tasks: Mapping[str, Task], models: Sequence[str]) -> List[Line]:
    """What the store holds of these tasks as their recipes are now: one line per task, test split and model."""
    lines: List[Line] = []
    for name, task in tasks.items():
        for model in models:
            recipe = task.recipe_of(model)
            by_lr: Dict[float, List[Run]] = {lr: [] for lr in recipe.lrs}
            for lr, runs in by_lr.items():
                while run := store.find(cell(name, model, lr, len(runs)), recipe):
                    runs.append(run)
            seeds = min(map(len, by_lr.values()))
            if seeds:
                lines += _best(name, model, {lr: runs[:seeds] for lr, runs in by_lr.items()})
    splits = {name: list(dict.fromkeys(line.split for line in lines if line.task == name)) for name in tasks}
    return sorted(lines, key=lambda line: (list(tasks).index(line.task), splits[line.task].index(line.split)))


def _best(task: str, model: str, by_lr: Mapping[float, Sequence[Run]]) -> List[Line]:
    """Lines of the learning rate whose runs have the best mean validation score (the smaller one if they tie)."""
    lr = max(sorted(by_lr), key=lambda lr: sum(run.validation for run in by_lr[lr]))
    runs = by_lr[lr]
    steps = Spread.of(run.steps for run in runs)
    scores = {split: tuple(run.accuracy[split] for run in runs) for split in runs[0].accuracy}
    return [Line(task, split, model, Spread.of(s), s, lr, steps, runs[0]) for split, s in scores.items()]


def chosen(names: str, texts: Texts) -> Dict[str, Task]:
    """Tasks by comma-separated names, beginnings of names or "all" (whose files are given); ValueError otherwise."""
    if names == "all":
        given = texts.background and texts.babi
        return {name: task for name, task in TASKS.items() if given or not task.needs_text}
    found: Dict[str, Task] = {}
    for name in names.split(","):
        matches = {n: task for n, task in TASKS.items() if n == name} or {
            n: task for n, task in TASKS.items() if n.startswith(name)
        }
        if not matches:
            raise ValueError(f"task={name!r} is unknown; use all or some of {', '.join(TASKS)}")
        found.update(matches)
    return found


def main() -> None:
    """Train, print the table, write Markdown and JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probes", description=__doc__)
    parser.add_argument("--tasks", default="all", help="names, beginnings of names, or all")
    parser.add_argument("--models", default=",".join(MODELS), help=f"some of {', '.join(MODELS)}")
    parser.add_argument("--seeds", type=int, default=1, help="trained models per task, model and learning rate")
    parser.add_argument("--budget", type=float, default=0.0, help="CPU seconds per trained model; 0: no limit")
    parser.add_argument("--json", type=Path, default=Path("probes.json"), help="finished runs; a rerun continues it")
    parser.add_argument("--lrs", default="", help="learning rates to try instead of the recipes'")
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps instead of the recipes'")
    parser.add_argument("--background", type=Path, nargs="*", default=(), help="text files to hide facts in")
    parser.add_argument("--babi", type=Path, default=None, help="folder with qa1_train.txt, qa1_test.txt, ...")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    texts = Texts(tuple(args.background), args.babi)
    console = Console()
    changes: Dict[str, Any] = {"lrs": tuple(map(float, args.lrs.split(",")))} if args.lrs else {}
    if args.steps:
        changes["steps"] = args.steps
    models, store = args.models.split(","), Store(args.json)
    try:
        if args.seeds < 1 or args.budget < 0:
            raise ValueError(f"seeds={args.seeds} must be at least 1 and budget={args.budget} at least 0")
        tasks = {name: changed(task, changes) for name, task in chosen(args.tasks, texts).items()}
        device = resolve_device(args.device)
        torch.set_num_threads(1)
        given = {"lrs": args.lrs, "steps": args.steps, "budget": args.budget}
        options = "".join(f" --{name} {value}" for name, value in given.items() if value)
        write = partial(write_page, store, TASKS | tasks, options)
        measure(tasks, models, args.seeds, args.budget, store, texts, device, console, write)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None
    shown = Table(*HEADER, title="memory probes")
    for row in table(collect(store, tasks, models), tasks):
        shown.add_row(*row)
    console.print(shown)
    console.print(f"written to {args.json} and {args.json.with_suffix('.md')}")


def changed(task: Task, changes: Mapping[str, Any]) -> Task:
    """The task with these fields of its recipe set for every model."""
    own = {model: {**fields, **changes} for model, fields in task.own.items()}
    return replace(task, recipe=replace(task.recipe, **changes), own=own)


def write_page(store: Store, tasks: Mapping[str, Task], options: str = "") -> None:
    """The page of everything that the store holds, beside its JSON file, under the command that makes all of it."""
    lines = collect(store, tasks, list(MODELS))
    names, seeds = dict.fromkeys(line.task for line in lines), max((len(line.scores) for line in lines), default=1)
    command = f"python -m benchmarks.probes --tasks {','.join(names)} --seeds {seeds} --json {store.path.name}{options}"
    keep_page(store.path, render(lines, tasks), command)


if __name__ == "__main__":
    main()
