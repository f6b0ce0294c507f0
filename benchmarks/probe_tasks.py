"""The probes that the benchmark runs, how each is trained, and what papers report for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Dict, List, Tuple

from benchmarks.probe_training import Recipe
from nl_model.memory.config import MemoryConfig
from nl_model.probes import Probe
from nl_model.probes.babilong import Story, babilong, read_stories, story_words
from nl_model.probes.formal import LANGUAGES, language
from nl_model.probes.mad import (
    compression,
    fuzzy_recall,
    in_context_recall,
    memorization,
    noisy_recall,
    selective_copy,
)
from nl_model.probes.needle import KINDS, TEMPLATE_WORDS, needle
from nl_model.probes.recall import mqar, overwrite_mqar
from nl_model.probes.text import Background, Sentence, Words, sentences

BABI_TASKS = ("qa1", "qa2", "qa4", "qa5")
VOCABULARY = 1024


@dataclass(frozen=True)
class Texts:
    """Files that some probes need; read when the first of them is built."""

    background: Tuple[Path, ...] = ()
    """Prose to hide facts in."""
    babi: Path | None = None
    """Folder with qa1_train.txt, qa1_test.txt and so on."""

    @cached_property
    def sentences(self) -> List[Sentence]:
        """Sentences of all background files; ValueError without files."""
        if not self.background:
            raise ValueError("needs prose: give --background FILE ...")
        return [s for path in self.background for s in sentences(path.read_text(encoding="utf-8-sig"))]

    def stories(self, task: str) -> Mapping[str, Sequence[Story]]:
        """Training and test stories of one bAbI task; ValueError without the folder."""
        if self.babi is None:
            raise ValueError("needs bAbI: give --babi FOLDER")
        return {split: read_stories((self.babi / f"{task}_{split}.txt").read_text()) for split in ("train", "test")}


Published = Mapping[str, Mapping[str, float]]
"""Figures in percent: split to model to value."""


@dataclass(frozen=True)
class Task:
    """One line of the benchmark."""

    build: Callable[[Texts], Probe]
    """ValueError where it needs a file that was not given."""
    recipe: Recipe
    """What attention is trained by, and the others but for `own`."""
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Model to the fields of the recipe that are its own."""
    published: Published = field(default_factory=dict)
    """What papers report, at other sizes and with other training; for orientation only."""
    needs_text: bool = False
    """Left out unless it is asked for by name or its files are given."""

    def recipe_of(self, model: str) -> Recipe:
        """The recipe by which one model is trained."""
        return replace(self.recipe, **self.own.get(model, {}))


LESSONS: Dict[str, Callable[[], Probe]] = {
    "mqar-16-4, 32 keys": lambda: mqar(512, 16, 4, used=32),
    "mqar-16-4": lambda: mqar(512, 16, 4),
    "mqar-16-4, 64 words": lambda: mqar(64, 16, 4),
}
"""Easier probes over the tokens of a task."""


def lessons(recipe: Recipe) -> List[Probe]:
    """The probes that a recipe begins with."""
    return [LESSONS[name]() for name in recipe.lessons]


def _mad(transformer: float, titans: float, hope: float) -> Published:
    """Nested Learning, table 4."""
    return {"test": {"Transformer": transformer, "Titans": titans, "Hope": hope}}


def _formal(transformer: Tuple[float, float], hope: Tuple[float, float] = (100, 100)) -> Published:
    """Nested Learning, table 5, bins 0 and 1."""
    return {f"bin{i}": {"Transformer": transformer[i], "Hope": hope[i]} for i in range(2)}


def _ruler(transformer: float, titans: float, hope: float) -> Published:
    """Nested Learning, table 1, at 4,096 tokens (ours are far shorter)."""
    return {"test": {"Transformer": transformer, "Titans": titans, "Hope": hope}}


# Few words first: among 32 keys and 32 values attention finds out within 300 steps that the answer stands behind the
# key, and then learns the other words without a plateau. With all 512 tokens from the start it guesses among the values
# in context for thousands of steps (docs/LOG.md).
RECALL = Recipe(
    heads=2,
    steps=1600,
    lessons=("mqar-16-4, 32 keys", "mqar-16-4"),
    lesson_share=0.55,
    weight_decay=0.0,
    warmup=0.02,
    validation=128,
)
OVERWRITE = replace(RECALL, steps=900, lessons=("mqar-16-4, 64 words",), lesson_share=0.5)
MAD = Recipe(mlp=2, heads=2, steps=400, batch=16, weight_decay=0.0, examples=12_800)
MAD_LONG = replace(MAD, steps=1200)
FORMAL = Recipe(mlp=4, steps=400, patience=0)
TEXT = Recipe(dim=128, mlp=4, test=500)

STORING = MemoryConfig(chunk=16, mem_chunk=16)
"""Steps below 1 store what they write; keys, values and gates are made anew by changed memories every 16 tokens."""
REFLECTING = MemoryConfig(eta_max=1.999, chunk=256, mem_chunk=256)
"""A step of 2 reflects a memory at its key: the eigenvalue of -1 that counting modulo two asks for. One chunk holds a
whole word, so within a word keys and gates stay as they are; with shorter ones longer words fail (docs/LOG.md)."""

_OWN: Dict[str, Mapping[str, Any]] = {
    "mqar-64-4": {"steps": 1200},
}
"""What Hope's recipes change beside the memories."""

_PUBLISHED: Dict[str, Published] = {
    "mqar-64-4": {"test": {"Transformer": 100}},
    "mqar-128-8": {"test": {"Transformer": 100}},
    "mad-recall": _mad(100, 100, 100),
    "mad-fuzzy": _mad(47.9, 50.0, 52.1),
    "mad-copy": _mad(96.2, 99.4, 99.7),
    "mad-compress": _mad(49.4, 49.8, 51.2),
    "mad-memorize": _mad(83.7, 83.4, 85.2),
    "parity": _formal((46.4, 0)),
    "aa": _formal((0, 0)),
    "abab": _formal((0, 0)),
    "anbn": _formal((100, 100)),
    "anbncn": _formal((100, 100)),
    "shuffle2": _formal((100, 100)),
    "niah-single-1": _ruler(88.6, 100, 100),
    "niah-single-2": _ruler(100, 99.6, 99.2),
    "niah-single-3": _ruler(78.0, 74.2, 73.2),
    "niah-multikey": _ruler(79.4, 26.4, 29.4),
}


def _needle(kind: str, length: int) -> Callable[[Texts], Probe]:
    def make(texts: Texts) -> Probe:
        prose = [] if kind == "single-1" else texts.sentences
        words = Words.of(TEMPLATE_WORDS, prose, VOCABULARY)
        return needle(kind, length, words, Background(prose) if prose else None)

    return make


def _babilong(task: str, length: int) -> Callable[[Texts], Probe]:
    def make(texts: Texts) -> Probe:
        stories = texts.stories(task)
        prose = texts.sentences if length else []
        known = story_words([story for split in stories.values() for story in split])
        words = Words.of(known, prose, VOCABULARY if length else len(known) + 2)
        return babilong(task, length, stories, words, Background(prose) if prose else None)

    return make


def _hope(name: str) -> Mapping[str, Mapping[str, Any]]:
    """What is Hope's alone in a recipe: one wide head, because a memory holds as many keys as its head is wide."""
    memory = REFLECTING if name in LANGUAGES else STORING
    return {"hope": {"heads": 1, "memory": memory, **_OWN.get(name, {})}}


def _tasks() -> Dict[str, Task]:
    built: Dict[str, Tuple[Callable[[Texts], Probe], Recipe]] = {
        "mqar-64-4": (lambda _: mqar(512, 64, 4), RECALL),
        "mqar-128-8": (lambda _: mqar(512, 128, 8), RECALL),
        "overwrite-32-4": (lambda _: overwrite_mqar(64, 32, 4, 2), OVERWRITE),
        "mad-recall": (lambda _: in_context_recall(length=64), MAD_LONG),
        "mad-fuzzy": (lambda _: fuzzy_recall(length=64), MAD_LONG),
        "mad-noisy": (lambda _: noisy_recall(length=64), MAD_LONG),
        "mad-copy": (lambda _: selective_copy(length=64, copied=8), MAD_LONG),
        "mad-compress": (lambda _: compression(), MAD_LONG),
        "mad-memorize": (lambda _: memorization(), MAD),
    }
    for name in LANGUAGES:
        built[name] = (lambda _, name=name: language(name), FORMAL)  # type: ignore[misc]
    tasks = {name: Task(make, recipe, _hope(name), _PUBLISHED.get(name, {})) for name, (make, recipe) in built.items()}
    for kind in KINDS:
        name = f"niah-{kind}"
        tasks[name] = Task(_needle(kind, 256), TEXT, _hope(name), _PUBLISHED[name], needs_text=kind != "single-1")
    for task in BABI_TASKS:
        for length in (0, 256, 512):
            name = f"babilong-{task}-{length}"
            tasks[name] = Task(_babilong(task, length), TEXT, _hope(name), needs_text=True)
    return tasks


TASKS = _tasks()
