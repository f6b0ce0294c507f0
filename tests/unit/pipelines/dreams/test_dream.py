"""Dreams: a pure function of the round, made of real recent experience only, few, marked, and never told twice."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import numpy as np
import pytest
import torch

import pipelines.dreams.dream
from nl_model.config import LevelConfig
from nl_model.model import NestedLM
from pipelines.config.dreams import DreamConfig
from pipelines.config.sleep import SleepConfig
from pipelines.dreams.dream import (
    Night,
    dream,
    fire_level,
    generate_dreams,
    room_for_dreams,
    split_recent,
    to_records,
    top_and_random,
)
from pipelines.dreams.file import FILE, read_dreams, write_dreams
from pipelines.experience import DREAM_KEY, ExperienceStore, Record, Snapshot, dream_key
from pipelines.sleep.batches import RoundBatches
from pipelines.sleep.plan import RoundPlan
from pipelines.sleep.training import Place

CONTEXT, BASE, STREAMED, FIRST, LAST = 16, 9, 120, 40, 110
QUARANTINED = set(range(45, 110, 7))
LOOSE = DreamConfig(
    share=0.25, cap=1.0, candidates=12, keep_top=3, keep_random=2, band=50.0, max_copied=1.0, prompt=0.5
)
"""Filters so wide that an untrained model's dreams pass."""


def record(key: int) -> Record:
    tokens = np.random.default_rng(key + 100).integers(0, 257, CONTEXT + 1)
    kind = "base" if key < 0 else "quarantined" if key in QUARANTINED else "real"
    surprise = math.inf if kind == "quarantined" else 1.0 + key % 5
    return Record(key=key, source=f"s{key % 3}", subject=f"p{key}", kind=kind, surprise=surprise, tokens=tokens)


def a_dream(round_number: int, number: int, parent: int = 3) -> Record:
    tokens = np.zeros(CONTEXT + 1, np.int64)
    return Record(
        key=dream_key(round_number, number), source="(dreams)", kind="dream", parents=(parent,), tokens=tokens
    )


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Snapshot]:
    """A base mixture, a stream with quarantined rows, and the dreams of an earlier round between its rows."""
    path = tmp_path_factory.mktemp("night") / "store"
    with ExperienceStore.open(path, CONTEXT, "uint16") as store:
        store.append([record(-1 - i) for i in range(BASE)])
        store.append([record(key) for key in range(60)])
        store.commit()
        store.append([a_dream(1, n) for n in range(3)])
        store.append([record(key) for key in range(60, STREAMED)])
        store.commit()
    yield Snapshot.open(path)


@pytest.fixture
def model(make_model: Callable[..., NestedLM], make_levels: Callable[..., Dict[str, LevelConfig]]) -> NestedLM:
    return make_model(make_levels(), 257, 1)


def plan(**values: Any) -> RoundPlan:
    return replace(RoundPlan(2, 7, FIRST, LAST, "fast", 1, 640, 6, 5), **values)


def told(night: Night) -> List[Any]:
    return [(d.tokens.tolist(), d.parents, d.way, d.surprise, d.score) for d in night.dreams]


def test_a_round_dreams_the_same_every_time(model: NestedLM, snapshot: Snapshot) -> None:
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    one = dream(model, snapshot, plan(), LOOSE)
    torch.manual_seed(99)
    np.random.seed(99)
    two = dream(model, snapshot, plan(), LOOSE)
    assert told(one) == told(two) and len(one.dreams) == 5 and one.rejected == two.rejected
    for other in (plan(round=3), plan(seed=6)):
        assert told(dream(model, snapshot, other, LOOSE)) != told(one)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters()), "the awake model is untouched"
    assert one.generated == 12 == len(one.dreams) + sum(one.rejected.values())


def test_later_commits_change_nothing(model: NestedLM, tmp_path: Path) -> None:
    """What a round dreams depends on keys up to its last one, not on what else the store held by then."""
    with ExperienceStore.open(tmp_path / "store", CONTEXT, "uint16") as store:
        store.append([record(key) for key in range(LAST + 1)])
        early = store.commit()
        store.append([a_dream(1, 0), *(record(key) for key in range(LAST + 1, STREAMED))])
        late = store.commit()
    nights = [dream(model, Snapshot.open(tmp_path / "store", v), plan(), LOOSE) for v in (early, late)]
    assert told(nights[0]) == told(nights[1]) and nights[0].dreams


@pytest.mark.parametrize("seed", range(5))
def test_parents_are_real_recent_experience_and_nothing_else(model: NestedLM, snapshot: Snapshot, seed: int) -> None:
    cfg = replace(LOOSE, candidates=40, keep_top=40, combine=0.5)
    night = dream(model, snapshot, plan(seed=seed), cfg)
    kinds = dict(zip(snapshot.keys.tolist(), snapshot.kinds.tolist(), strict=True))
    _, held = split_recent(snapshot, plan(seed=seed), cfg)
    measured = set(snapshot.keys[held].tolist())
    assert len(night.dreams) > 10 and {len(d.parents) for d in night.dreams} == {1, 2}
    for one in night.dreams:
        assert all(FIRST <= key <= LAST and kinds[key] == 0 for key in one.parents), "not old, base, quarantined, dream"
        assert not measured & set(one.parents), "what measures is no prompt"
        text = record(one.parents[0]).tokens
        size = one.prompt if len(one.parents) == 1 else one.prompt // 2
        assert one.tokens[:size].tolist() == text[:size].tolist()
        if len(one.parents) == 2:
            other, span = record(one.parents[1]).tokens.tolist(), one.tokens[size : one.prompt].tolist()
            assert any(other[i : i + len(span)] == span for i in range(len(other) - len(span) + 1))
        assert math.isfinite(one.surprise) and math.isfinite(one.score) and one.tokens.shape == (CONTEXT + 1,)


def test_measure_is_real_recent_experience_apart_from_prompts(snapshot: Snapshot) -> None:
    prompts, held = split_recent(snapshot, plan(), replace(LOOSE, measure=16))
    assert len(held) == 16 and not set(prompts.tolist()) & set(held.tolist())
    found = sorted(snapshot.keys[np.concatenate([prompts, held])].tolist())
    assert found == [key for key in range(FIRST, LAST + 1) if key not in QUARANTINED]


def test_dreaming_has_no_way_to_probe_data() -> None:
    """It sees a snapshot, a plan and a model; modules that know held-out text are not imported."""
    root = Path(pipelines.dreams.dream.__file__).parent
    for name in ("dream", "filters", "score", "file"):
        tree = ast.parse((root / f"{name}.py").read_text())
        froms = {(n.module, a.name) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
        modules = {module for module, _ in froms}
        assert not modules & {
            "pipelines.gate.probe",
            "pipelines.data.corpus",
            "pipelines.data.module",
            "pipelines.gate.decision",
        }
        assert {a for module, a in froms if module == "pipelines.data.stream"} <= {"SUBJECT_SEPARATOR"}


def test_the_cap_and_the_store_bound_a_round(model: NestedLM, snapshot: Snapshot) -> None:
    cfg = replace(LOOSE, cap=0.05)
    assert room_for_dreams(cfg, plan()) == 5 and room_for_dreams(cfg, plan(dreams_stored=3)) == 2
    assert room_for_dreams(cfg, plan(dreams_stored=5)) == 0 and room_for_dreams(cfg, plan(dreams_stored=50)) == 0
    assert len(dream(model, snapshot, plan(dreams_stored=3), cfg).dreams) == 2
    assert not dream(model, snapshot, plan(dreams_stored=5), cfg).generated, "no work for nothing"


def test_too_little_experience_gives_no_dreams(model: NestedLM, snapshot: Snapshot) -> None:
    assert not dream(model, snapshot, plan(first_key=LAST), LOOSE).dreams
    assert not dream(model, snapshot, plan(first_key=LAST + 1), LOOSE).dreams


def test_a_model_that_is_not_finite_gives_no_dreams(model: NestedLM, snapshot: Snapshot) -> None:
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    assert not dream(model, snapshot, plan(), LOOSE).generated


def test_one_random_level_fires_for_those_that_should(model: NestedLM) -> None:
    tokens = torch.randint(0, 257, (6, CONTEXT), generator=torch.Generator().manual_seed(0))
    fired = np.array([True, False, True, True, False, True])
    before = model(tokens)
    with fire_level(model, fired, np.random.default_rng(0), 3.0) as ways:
        during = model(tokens)
    assert [bool(way) for way in ways] == fired.tolist() and len({*ways}) > 2
    for row, way in enumerate(ways):
        assert torch.equal(during[row], before[row]) != bool(way)
    assert torch.equal(model(tokens), before), "nothing stays behind"
    level = model.blocks[1].levels["fast"]  # type: ignore[index]
    row = next(i for i, way in enumerate(ways) if way == "blocks.1.fast")
    with torch.no_grad():
        level.down.weight.mul_(3.0)
    torch.testing.assert_close(during[row], model(tokens)[row], rtol=1e-5, atol=1e-5)


def test_a_stronger_gain_dreams_something_else(model: NestedLM, snapshot: Snapshot) -> None:
    rows = snapshot.rows_between(FIRST, LAST)
    for fire, same in ((0.0, True), (1.0, False)):
        cfg = replace(LOOSE, fire=fire, temperature=0.0)
        texts = [
            [d.tokens.tolist() for d in generate_dreams(model, snapshot, rows, c, np.random.default_rng(1))]
            for c in (cfg, replace(cfg, gain=1.0))
        ]
        assert (texts[0] == texts[1]) is same


def test_the_best_and_some_others_are_kept() -> None:
    scores = [0.1, 0.9, 0.5, 0.9, 0.3, 0.2]
    picked = [top_and_random(scores, 3, 2, 9, np.random.default_rng(seed)) for seed in range(60)]
    assert all(p[:3] == [1, 3, 2] and len(p) == 5 for p in picked)
    assert {tuple(sorted(p[3:])) for p in picked} == {(0, 4), (0, 5), (4, 5)}
    assert top_and_random(scores, 3, 2, 4, np.random.default_rng(0)) == picked[0][:4]
    assert sorted(top_and_random(scores, 9, 2, 99, np.random.default_rng(0))) == list(range(6))


def test_dreams_are_marked_and_carry_parents_and_subjects(model: NestedLM, snapshot: Snapshot, tmp_path: Path) -> None:
    night = dream(model, snapshot, plan(), replace(LOOSE, combine=1.0))
    records = to_records(night, snapshot, plan())
    assert [r.key for r in records] == [dream_key(2, n) for n in range(5)]
    for made, one in zip(records, night.dreams, strict=True):
        assert made.kind == "dream" and made.parents == one.parents and made.source == "(dreams)"
        assert made.subject == "\n".join(f"p{key}" for key in one.parents), "who is in a parent is in the dream"
    write_dreams(tmp_path, records, CONTEXT, "uint16")
    again = read_dreams(tmp_path)
    assert [(r.key, r.parents, r.subject, r.tokens.tolist()) for r in again] == [
        (r.key, r.parents, r.subject, r.tokens.tolist()) for r in records
    ]
    assert read_dreams(tmp_path / "nowhere") == []
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-400])
    with pytest.raises(ValueError, match=r"dreams\.arrow is damaged"):
        read_dreams(tmp_path)


def test_batches_take_dreams_in_place_of_old_experience(snapshot: Snapshot) -> None:
    dreams = np.arange(3)[:, None] + np.full((3, CONTEXT + 1), 200)
    sleep, steps = SleepConfig(batch=8, recent=0.5, balance=0.0), 24
    at = plan(steps=steps)
    mixed = RoundBatches(snapshot, at, sleep, dreams, replace(LOOSE, share=1 / 16, repeats=99))
    plain = RoundBatches(snapshot, at, sleep)
    counts = np.zeros(3, int)
    for step in range(steps):
        found = mixed.batch(step)
        tokens, guided = found.tokens_BS, found.recent_B
        number = step % 2  # half a dream per step
        assert len(tokens) == 8 and int(guided.sum()) == 4 + number
        others = plain.batch(step).tokens_BS[: 8 - number]
        assert torch.equal(tokens[: 8 - number], others), "the others are as without dreams"
        for row in tokens[8 - number :]:
            counts[int(row[0]) - 200] += 1
        shares = [mixed.batch(step, Place(rank, 4)) for rank in range(4)]
        assert all(torch.equal(s.tokens_BS, tokens[r::4]) for r, s in enumerate(shares))
        assert all(torch.equal(s.recent_B, guided[r::4]) for r, s in enumerate(shares))
    assert counts.tolist() == [4, 4, 4]
    seldom = RoundBatches(snapshot, at, sleep, dreams, replace(LOOSE, share=0.5, repeats=2))
    assert sum(len(seldom.dreamt(step)) for step in range(steps)) == 6


def test_stored_dreams_are_neither_recent_nor_replayed(snapshot: Snapshot) -> None:
    batches = RoundBatches(snapshot, plan(last_key=STREAMED - 1), SleepConfig(batch=8))
    drawn = {int(key) for step in range(200) for key in snapshot.keys[batches.rows(step)[0]]}
    assert len(drawn) > 100 and max(drawn) < DREAM_KEY


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.5}, "dreams.share=1.5 must lie between 0 and 1"),
        ({"prompt": 1.0}, "dreams.prompt=1.0 must lie between 0 and 1"),
        ({"share": 0.1, "keep_top": 0, "keep_random": 0}, "dreams.keep_top=0 and dreams.keep_random=0 keep no dream"),
        ({"score": "taste"}, "dreams.score='taste' is unknown; use one of gradient, progress"),
        ({"temperature": math.nan}, "dreams.temperature=nan"),
        ({"ngram": 0}, "dreams.ngram=0 must be at least 1"),
    ],
)
def test_bad_settings_are_refused(settings: Dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DreamConfig(**settings)
