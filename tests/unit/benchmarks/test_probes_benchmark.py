"""The probe benchmark: it learns what can be learned, counts as the probe says, and continues where it stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import pytest
import torch
from numpy.random import Generator
from rich.console import Console
from torch import Tensor, nn

from benchmarks import probe_page, probe_training, probes
from benchmarks.probe_page import Line
from benchmarks.probe_tasks import LESSONS, TASKS, Task, Texts, lessons
from benchmarks.probe_training import Answerer, Batches, Recipe, Run, accuracy, build, train
from benchmarks.tables import Spread
from nl_model.config import ModelConfig
from nl_model.memory.config import MemoryConfig
from nl_model.probes import IGNORE, Probe, stream
from nl_model.probes.mad import compression

CPU = torch.device("cpu")
TINY = Recipe(dim=16, mlp=4, steps=120, batch=16, test=40, validation=40, checks=4)
SHAPE = ModelConfig(dim=16, blocks=2, heads=1, context=8)


def successor(rng: Generator, n: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Answer the token plus one at even places: learnable from single tokens."""
    inputs = rng.integers(0, 8, (n, 8))
    targets = np.where(np.arange(8) % 2 == 0, (inputs + 1) % 8, IGNORE)
    return inputs, targets


PROBE = Probe("successor", 8, successor)


class Fixed(nn.Module):
    """Answers the token itself plus one, except where the token is 7."""

    def forward(self, tokens_BT: Tensor, scored_BT: Tensor) -> Tensor:
        return nn.functional.one_hot((tokens_BT[scored_BT] + 1).clamp(max=7), 8)


def test_accuracy_counts_tokens_or_whole_sequences() -> None:
    inputs, targets = PROBE.sample(stream(0, "test"), 300, "test")
    asked, wrong = targets != IGNORE, (inputs == 7) & (targets != IGNORE)
    assert wrong.any() and not wrong.all()
    net: Any = Fixed()
    per_token = accuracy(net, PROBE, inputs, targets, CPU, batch=77)
    assert per_token == pytest.approx(1 - wrong.sum() / asked.sum())
    per_sequence = accuracy(net, replace(PROBE, score="sequence"), inputs, targets, CPU, batch=77)
    assert per_sequence == pytest.approx(1 - wrong.any(1).mean())


def test_training_solves_an_easy_probe_and_stops_then() -> None:
    first, again = (train(PROBE, "attention", TINY, 1e-2, 3, 0.0, CPU) for _ in range(2))
    assert first.accuracy == {"test": 1.0} and first.validation == 1.0
    assert first.stopped == "solved" and first.steps == 60 and first.loss < 0.1
    assert replace(first, seconds=0) == replace(again, seconds=0), "the seed decides everything"


def test_a_budget_ends_training() -> None:
    assert train(PROBE, "attention", TINY, 1e-2, 3, 1e-9, CPU).stopped == "budget"
    endless = train(PROBE, "attention", replace(TINY, steps=3, patience=0), 1e-2, 3, 0.0, CPU)
    assert endless.stopped == "steps" and endless.steps == 3


def test_a_fixed_training_set_is_used_again_and_again() -> None:
    batches = Batches(PROBE, "train", seed=0, batch=64, examples=3, device=CPU)
    rows = {tuple(row) for _ in range(2) for row in batches.draw()[0].tolist()}
    fresh = Batches(PROBE, "train", seed=0, batch=64, examples=0, device=CPU)
    assert len(rows) == 3 and len({tuple(row) for row in fresh.draw()[0].tolist()}) > 60


def test_answers_from_the_last_output_see_nothing_else() -> None:
    """With readout "last" every answer depends on the closing token's output, so on each token before it."""
    probe = compression(vocab_size=8, length=7)
    net = Answerer(build("attention", 8, SHAPE, 0), probe.readout, 0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    inputs, targets = (torch.from_numpy(a) for a in probe.sample(stream(0, "test"), 2, "test"))
    changed = inputs.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 7
    with torch.no_grad():
        before, after = net(inputs, targets != IGNORE), net(changed, targets != IGNORE)
    assert before.shape == (14, 8) and (before != after).any(-1).all()


def test_the_answerer_scores_as_the_language_model_does() -> None:
    model = build("attention", 8, SHAPE, 0)
    inputs, targets = (torch.from_numpy(a) for a in PROBE.sample(stream(0, "test"), 4, "test"))
    with torch.no_grad():
        whole = model(inputs)[targets != IGNORE]
        assert torch.allclose(Answerer(model, "each", 0)(inputs, targets != IGNORE), whole, atol=1e-6)


def test_no_matrix_starts_at_zero() -> None:
    first, again, other = (build("attention", 8, SHAPE, seed) for seed in (0, 0, 1))
    for (name, one), same, different in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert one.std() > 0.05 and torch.equal(one, same) and not torch.equal(one, different), name


def test_a_copied_token_is_the_first_answer() -> None:
    """The head starts as the embedding: from a token's own embedding it answers that token."""
    model = build("attention", 64, replace(SHAPE, dim=64), 0)
    with torch.no_grad():
        assert torch.equal(model.head(model.embedding.weight).argmax(-1), torch.arange(64))


def test_validation_does_not_look_during_lessons() -> None:
    """A lesson that is the task itself is solved early, yet a run ends only when the task itself has come."""
    recipe = replace(TINY, lesson_share=0.5)
    run = train(PROBE, "attention", recipe, 1e-2, 3, 0.0, CPU, [PROBE])
    assert run.stopped == "solved" and run.steps == 120


def run_of(score: float, validation: float, lr: float, seed: int, stopped: str = "steps") -> Run:
    return Run(lr, seed, {"test": score}, validation, 0.5, 10, 1.0, 100, stopped, 64, 512)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> List[tuple[str, float, int]]:
    """Training replaced by a formula: attention scores 0.9, others 0.5; lr 0.1 validates better but tests worse."""
    calls: List[tuple[str, float, int]] = []

    def fake(_probe: Probe, model: str, _recipe: Recipe, lr: float, seed: int, *_rest: Any) -> Run:
        calls.append((model, lr, seed))
        score = (0.9 if model == "attention" else 0.5) - lr + seed / 100
        return run_of(score, lr, lr, seed)

    monkeypatch.setattr(probes, "train", fake)
    return calls


def measured(path: Path, tasks: Dict[str, Task], models: List[str], budget: float = 0.0) -> List[Line]:
    store = probes.Store(path)
    probes.measure(tasks, models, 2, budget, store, Texts(), CPU, Console(quiet=True))
    return probes.collect(store, tasks, models)


def recall_by(recipe: Recipe, **own: Dict[str, Any]) -> Dict[str, Task]:
    return {"mqar-64-4": replace(TASKS["mqar-64-4"], recipe=recipe, own=own)}


def test_finished_runs_are_not_repeated(trained: List[Any], tmp_path: Path) -> None:
    path = tmp_path / "probes.json"
    tasks = recall_by(replace(TINY, lrs=(0.01, 0.1)))
    first = measured(path, tasks, ["attention"])
    assert sorted(trained) == [("attention", lr, seed) for lr in (0.01, 0.1) for seed in (0, 1)]
    again = measured(path, tasks, ["attention", "other"])
    assert sorted(trained[4:]) == [("other", lr, seed) for lr in (0.01, 0.1) for seed in (0, 1)]
    assert again[: len(first)] == first
    measured(path, recall_by(replace(TINY, lrs=(0.01, 0.1), steps=7)), ["attention"])
    assert len(trained) == 12, "another recipe is another run"
    assert set(json.loads(path.read_text())) == {"written", "versions", "machine", "runs"}


def test_a_run_is_kept_as_soon_as_it_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Cut off in the second seed, the benchmark still has the first one, and its page shows it."""

    def fake(_probe: Probe, _model: str, _recipe: Recipe, lr: float, seed: int, *_rest: Any) -> Run:
        if seed:
            raise KeyboardInterrupt
        return run_of(0.75, 1.0, lr, seed)

    monkeypatch.setattr(probes, "train", fake)
    path, tasks = tmp_path / "probes.json", recall_by(TINY)
    with pytest.raises(KeyboardInterrupt):
        measured(path, tasks, ["attention"])
    (line,) = probes.collect(probes.Store(path), tasks, ["attention"])
    assert line.scores == (0.75,) and line.steps == Spread(10, 10, 10) and line.run.parameters == 100
    probes.write_page(probes.Store(path), tasks, " --budget 5")
    page = path.with_suffix(".md").read_text()
    assert "`python -m benchmarks.probes --tasks mqar-64-4 --seeds 1 --json probes.json --budget 5`" in page
    assert "| mqar-64-4 | test | attention | 75.0 (75.0 .. 75.0) | 75.0 |" in page


def test_a_model_may_have_fields_of_the_recipe_for_itself(trained: List[Any], tmp_path: Path) -> None:
    """They decide its runs and nobody else's, hold against changes from the command line, and are shown."""
    memory = MemoryConfig(eta_max=0.5)
    tasks = recall_by(TINY, other={"memory": memory, "lrs": (0.2,), "lessons": ("mqar-16-4",)})
    assert tasks["mqar-64-4"].recipe_of("attention") == TINY
    assert tasks["mqar-64-4"].recipe_of("other") == replace(TINY, memory=memory, lrs=(0.2,), lessons=("mqar-16-4",))
    measured(tmp_path / "a.json", tasks, ["attention", "other"])
    tasks["mqar-64-4"] = replace(tasks["mqar-64-4"], own={"other": {"memory": MemoryConfig(eta_max=0.25)}})
    trained.clear()
    lines = measured(tmp_path / "a.json", tasks, ["attention", "other"])
    assert {model for model, *_ in trained} == {"other"}
    shown = {(row[0], row[3]): row[-1] for row in probe_page.recipe_rows(lines, tasks)}
    assert shown == {("mqar-64-4", "attention"): "", ("mqar-64-4", "other"): "eta_max 0.25"}
    asked = probes.changed(tasks["mqar-64-4"], {"steps": 7})
    assert {asked.recipe_of(model).steps for model in ("attention", "other")} == {7}


def test_a_run_that_its_budget_ended_counts_for_that_budget_only(tmp_path: Path) -> None:
    store = probes.Store(tmp_path / "probes.json")
    store.keep("a", TINY, 5.0, run_of(0.5, 0.5, 0.1, 0, "budget"))
    store.keep("b", TINY, 5.0, run_of(0.5, 0.5, 0.1, 0, "steps"))
    again = probes.Store(tmp_path / "probes.json")
    assert again.find("a", TINY, 5.0) is not None and again.find("a", TINY, 9.0) is None
    assert again.find("b", TINY, 9.0) == run_of(0.5, 0.5, 0.1, 0, "steps")
    assert again.find("a", TINY) is not None, "shown, whatever the budget was"


def test_the_learning_rate_is_chosen_on_validation_data(trained: List[Any], tmp_path: Path) -> None:
    (line,) = measured(tmp_path / "probes.json", recall_by(replace(TINY, lrs=(0.01, 0.1))), ["attention"])
    assert line.lr == 0.1 and line.spread == Spread.of(line.scores)
    assert line.scores == pytest.approx([0.8, 0.81]), "the better test score of lr 0.01 does not count"


def test_the_page_says_who_is_ahead(trained: List[Any], tmp_path: Path) -> None:
    tasks = recall_by(replace(TINY, lrs=(0.1,)))
    text = probe_page.render(measured(tmp_path / "a.json", tasks, ["attention", "other"]), tasks)
    scores = "| mqar-64-4 | test | attention | 80.5 (80.0 .. 81.0) | 80.0 81.0 | 0.1 | 10 | Transformer 100 |"
    assert scores in text and "* mqar-64-4 (test): attention 80.5%, other 40.5%" in text
    assert "### Where other is ahead\n\nNowhere in these runs." in text
    assert "ahead" not in probe_page.render(measured(tmp_path / "a.json", tasks, ["attention"]), tasks)
    ten = Spread(10, 10, 10)
    overlapping = [
        Line("t", "test", m, Spread(0.5, 0.4, 0.6), (0.4, 0.6), 0.1, ten, run_of(0.4, 0.4, 0.1, 0))
        for m in ("attention", "other")
    ]
    assert probe_page.ahead(overlapping, "attention") == []


def test_the_page_keeps_what_was_trained_elsewhere_and_drops_old_recipes(trained: List[Any], tmp_path: Path) -> None:
    parity = {"parity": replace(TASKS["parity"], recipe=TINY, own={})}
    measured(tmp_path / "a.json", recall_by(TINY), ["attention"])
    measured(tmp_path / "a.json", parity, ["attention"])
    store = probes.Store(tmp_path / "a.json")
    both = probes.collect(store, recall_by(TINY) | parity, ["attention"])
    assert [line.task for line in both] == ["mqar-64-4", "parity"]
    stale = recall_by(replace(TINY, dim=32)) | parity
    assert [line.task for line in probes.collect(store, stale, ["attention"])] == ["parity"]


def test_tasks_are_chosen_by_name_or_beginning() -> None:
    assert list(probes.chosen("parity,mqar", Texts())) == ["parity", "mqar-64-4", "mqar-128-8"]
    assert list(probes.chosen("aa", Texts())) == ["aa"]
    everything = probes.chosen("all", Texts())
    assert "niah-single-1" in everything and "niah-single-2" not in everything
    assert set(probes.chosen("all", Texts((Path("a"),), Path("b")))) == set(TASKS)
    with pytest.raises(ValueError, match="task='sorting'"):
        probes.chosen("sorting", Texts())


@pytest.mark.parametrize("name", TASKS)
def test_every_task_builds_and_fits_a_model(name: str, tmp_path: Path) -> None:
    """Inputs and answers lie in the vocabulary; tasks with text read their files."""
    prose = " ".join(f"It was the {i} time that the ship of the captain went out to sea." for i in range(300))
    (tmp_path / "prose.txt").write_text(prose)
    for split in ("train", "test"):
        story = "1 Mary went home.\n2 John went out.\n3 Where is Mary? \thome\t1\n"
        (tmp_path / f"{name.split('-')[1] if '-' in name else name}_{split}.txt").write_text(story)
    probe = TASKS[name].build(Texts((tmp_path / "prose.txt",), tmp_path))
    for split in probe.splits:
        inputs, targets = probe.sample(stream(0, split), 4, split)
        answers = targets[targets != IGNORE]
        assert len(answers) and max(inputs.max(), answers.max()) < probe.vocab_size and inputs.min() >= 0
    assert set(TASKS[name].published) <= set(probe.splits)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: build("mamba", 8, SHAPE, 0), "model='mamba'"),
        (lambda: Recipe(lrs=()), "lrs"),
        (lambda: Recipe(steps=0), "steps=0"),
        (lambda: Recipe(solved=0.0), "solved=0"),
        (lambda: Recipe(lesson_share=1.5), "lesson_share=1.5"),
        (lambda: TASKS["niah-single-2"].build(Texts()), "--background"),
        (lambda: TASKS["babilong-qa1-0"].build(Texts()), "--babi"),
    ],
)
def test_wrong_settings_are_named(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize("name", TASKS)
def test_lessons_use_the_tokens_of_their_task(name: str) -> None:
    for model in probe_training.MODELS:
        recipe = TASKS[name].recipe_of(model)
        assert set(recipe.lessons) <= set(LESSONS) and (recipe.memory is not None) == (model == "hope")
        if recipe.lessons:
            probe = TASKS[name].build(Texts())
            longest = max(probe.sample(stream(0, split), 1, split)[0].shape[1] for split in probe.splits)
            for lesson in lessons(recipe):
                inputs, _ = lesson.sample(stream(0, "train"), 4, "train")
                assert lesson.vocab_size == probe.vocab_size and inputs.shape[1] <= longest


def test_lessons_come_first_in_equal_parts() -> None:
    recipe = Recipe(steps=100, lesson_share=0.4)
    order = [probe_training._lesson(step, 2, recipe) for step in range(1, 101)]
    assert order == [0] * 20 + [1] * 20 + [2] * 60
    assert {probe_training._lesson(step, 0, recipe) for step in range(1, 101)} == {0}


def test_a_lesson_is_what_a_model_sees_first() -> None:
    """Three steps of lessons only: the loss is that of the lesson, whose answers are all the same token."""
    constant = Probe("constant", 8, lambda rng, n, _: (rng.integers(0, 8, (n, 8)), np.full((n, 8), 5)))
    recipe = replace(TINY, steps=60, lesson_share=1.0, checks=1)
    run = train(PROBE, "attention", recipe, 1e-2, 0, 0.0, CPU, [constant])
    assert run.loss < 0.1 and run.accuracy["test"] < 0.3


def test_the_rate_warms_up_and_ends_at_zero() -> None:
    rates = [probe_training._rate(step, Recipe(steps=100, warmup=0.1)) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and all(a > b for a, b in pairwise(rates[10:])) and rates[-1] < 1e-3


def test_the_rate_stays_up_through_the_lessons() -> None:
    recipe = Recipe(steps=100, warmup=0.1, lessons=("mqar-16-4",), lesson_share=0.6)
    rates = [probe_training._rate(step, recipe) for step in range(100)]
    assert set(rates[10:61]) == {1.0} and all(a > b for a, b in pairwise(rates[60:])) and rates[-1] < 1e-2
