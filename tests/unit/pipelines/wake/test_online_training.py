"""Online training: score before learning, nothing written before it is durable, exact budgets, resume to the bit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nl_model.flops import forward_flops, full_step_flops, write_flops
from nl_model.model import NestedLM
from pipelines.config.schema import Config, SleepConfig, WakeConfig
from pipelines.experience import Record
from pipelines.experience.memory import MemoryStore
from pipelines.experience.replay import held_rows
from pipelines.wake.hooks import HookCosts, NoHook
from pipelines.wake.online_training import FEWEST, OnlineTraining, visible_before
from pipelines.wake.writes import _writing, pool_flops, wake_flops, with_budget

Make = Callable[..., NestedLM]
BASE, CONTEXT = 12, 16


def record(key: int) -> Record:
    tokens = np.random.default_rng(key + 100).integers(0, 257, CONTEXT + 1).astype(np.uint16)
    return Record(key=key, source=f"s{key % 3}", kind="base" if key < 0 else "real", surprise=1.0, tokens=tokens)


class Reader:
    """Reads a stream of records; says what happened in which order."""

    def __init__(self, cfg: Config, model: NestedLM, read: int = 0, hook: NoHook | None = None) -> None:
        self.store = MemoryStore(CONTEXT, "uint16")
        self.store.append([record(-1 - i) for i in range(BASE)] + [record(i) for i in range(read)])
        self.cfg, self.model, self.key = cfg, model, read
        self.training = OnlineTraining(model, cfg, self.store.at, hook)
        self.flops: List[float] = []
        self.scores: List[Tuple[Tensor, Dict[str, Tensor]]] = []
        """Loss of each batch as it was told, and the weights at that moment."""
        self.durable: List[Dict[str, Tensor]] = []
        """Weights when each batch became durable."""

    def weights(self) -> Dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def batch(self) -> Tuple[Tensor, np.ndarray, List[Record]]:
        records = [record(self.key + i) for i in range(self.cfg.wake.batch)]
        tokens = torch.from_numpy(np.stack([r.tokens for r in records]).astype(np.int64))
        return tokens, np.array([r.key for r in records]), records

    def read(self, steps: int = 1) -> None:
        for _ in range(steps):
            tokens, keys, records = self.batch()

            def note(logits_BTV: Tensor, nll_BT: Tensor) -> Tensor:
                assert logits_BTV.shape[:2] == nll_BT.shape and not logits_BTV.requires_grad
                self.scores.append((nll_BT.detach().clone(), self.weights()))
                return torch.isfinite(nll_BT.mean(1))

            def wait(records: List[Record] = records) -> None:
                self.store.append(records)
                self.durable.append(self.weights())

            self.flops.append(self.training.step(tokens, keys, note, wait))
            self.key += len(keys)


@pytest.fixture
def make(make_config: Callable[..., Config], make_model: Make) -> Callable[..., Reader]:
    def made(read: int = 0, seed: int = 0, sleep: Dict[str, Any] | None = None, **wake: Any) -> Reader:
        settings = {"batch": 4, "writes": "all", "trained": 2.0, "replay": 0.5, **wake}
        cfg = make_config(wake=WakeConfig(**settings), sleep=SleepConfig(**{"batch": 4, **(sleep or {})}))
        return Reader(cfg, make_model(cfg.levels, seed=seed), read)

    return made


def same(a: Dict[str, Tensor], b: Dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("trained", [0.0, 0.3, 1.0, 1.7, 3.9])
@pytest.mark.parametrize("replay", [0.0, 0.65])
def test_text_is_scored_before_it_is_learned_and_durable_before_anything_is_written(
    make: Callable[..., Reader], make_model: Make, trained: float, replay: float
) -> None:
    one = make(trained=trained, replay=replay)
    for _ in range(7):
        before, (tokens, _, _) = one.weights(), one.batch()
        with torch.no_grad():
            expected = one.model.nll(tokens)
        one.read()
        told, at = one.scores[-1]
        torch.testing.assert_close(told, expected, rtol=1e-4, atol=1e-5)
        assert same(at, before) and same(one.durable[-1], before)
    assert len(one.scores) == len(one.durable) == 7, "every batch once"
    assert (one.training.steps > 0) == (trained > 0)


@pytest.mark.parametrize("average", [0, 6])
@pytest.mark.parametrize("cut", [1, 9, 16])
def test_a_resumed_learner_is_the_uninterrupted_one_to_the_bit(
    make: Callable[..., Reader], cut: int, average: int
) -> None:
    settings: Dict[str, Any] = {"trained": 1.3, "sleep": {"average": average, "balance": 0.5}}
    whole, first = make(**settings), make(**settings)
    whole.read(20)
    first.read(cut)
    second = make(read=first.key + 6, seed=1, **settings)  # the store is ahead of the checkpoint
    second.key = first.key
    second.model.load_state_dict(first.weights())
    second.training.load_state(first.training.state())
    second.read(20 - cut)
    assert same(second.weights(), whole.weights()) and same(second.training.state(), whole.training.state())
    assert second.flops == whole.flops[cut:]


@given(key=st.integers(0, 1 << 22))
def test_what_is_replayed_ends_at_a_place_that_the_key_alone_decides(key: int) -> None:
    bound = visible_before(key)
    assert bound <= key and key - bound <= max(FEWEST, key // 16), "not far behind"
    assert visible_before(max(0, key - 1)) <= bound, "and never back"


@pytest.mark.parametrize(("trained", "replay", "batch"), [(1.13, 0.0, 4), (2.15, 0.0, 2), (0.4, 0.0, 4), (1.8, 0.8, 4)])
def test_writes_are_reckoned_as_often_as_they_are_made(
    make: Callable[..., Reader], trained: float, replay: float, batch: int
) -> None:
    """What is charged per token beyond the tokens' own cost is the writes of a long run."""
    training = make(trained=trained, replay=replay).training
    made = 0
    for _ in range(4000):
        visits, old = training._take(batch)
        made += max(1, math.ceil(visits / batch)) if visits + old else 0
    wake = replace(training.cfg.wake, batch=batch)
    muon = replace(training.cfg.sleep.optimizer, name="muon")
    cfg = replace(training.cfg, wake=wake, sleep=replace(training.cfg.sleep, optimizer=muon))
    one = write_flops(cfg.model, cfg.levels, 257, muon) / (batch * cfg.model.context)
    assert _writing(cfg, 257, trained) / one == pytest.approx(made / 4000, rel=1e-3)


@given(epochs=st.floats(0.5, 5.0), replay=st.sampled_from([0.0, 0.4, 0.65, 1.0]), extra=st.floats(-0.2, 0.4))
def test_a_budget_is_what_it_costs(epochs: float, replay: float, extra: float) -> None:
    cfg = Config(wake=WakeConfig(writes="all", replay=replay), sleep=SleepConfig(epochs=epochs))
    full, forward = (float(count(cfg.model, cfg.levels, 257)) for count in (full_step_flops, forward_flops))
    costs = HookCosts(trained=extra * full, streamed=0.05 * full)
    found = with_budget(cfg, 257, costs)
    assert found.sleep.epochs == 0 and found.sleep.tokens_per_token == 0
    assert wake_flops(found, 257, costs) == pytest.approx(max(epochs * full, forward + 0.05 * full))
    for writes in ("fast", "none"):
        other = replace(cfg, wake=replace(cfg.wake, writes=writes, replay=0.0))
        spread = with_budget(other, 257)
        total = wake_flops(spread, 257) + spread.sleep.tokens_per_token * pool_flops(spread, 257)
        assert total == pytest.approx(max(epochs * full, wake_flops(other, 257)))


@pytest.mark.parametrize("epochs", [0.8, 1.5, 2.0])
@pytest.mark.parametrize("replay", [0.0, 0.65])
def test_what_is_spent_is_the_budget(
    make: Callable[..., Reader], make_model: Make, epochs: float, replay: float
) -> None:
    cfg = make().cfg
    cfg = replace(cfg, wake=replace(cfg.wake, replay=replay), sleep=replace(cfg.sleep, epochs=epochs))
    one = Reader(with_budget(cfg, 257), make_model(cfg.levels))
    one.read(60)
    full = full_step_flops(cfg.model, cfg.levels, 257)
    tokens = 60 * cfg.wake.batch * CONTEXT
    assert sum(one.flops) / (tokens * full) == pytest.approx(epochs, rel=0.02), "but for what is not due yet"


def test_replay_holds_as_much_as_it_may_and_nothing_ahead_of_the_reader(make: Callable[..., Reader]) -> None:
    one = make(read=400, sleep={"replay_bytes": 20 * CONTEXT})
    one.key = 200
    one.read()
    assert one.training.replay is not None
    bound, found, replay = one.training.replay
    assert bound == visible_before(200) <= 200 and len(replay.held) == 20
    visible = np.flatnonzero(found.keys < bound)
    assert len(visible) == BASE + bound
    assert replay.held.tolist() == held_rows(visible, found.keys, 20, one.cfg.run.seed).tolist()


def test_a_sequence_that_is_not_finite_costs_nobody_else(make: Callable[..., Reader]) -> None:
    one = make(replay=0.0, trained=1.0)
    tokens, keys, _ = one.batch()
    only = set(tokens[1, :-1].tolist()) - {t for i in (0, 2, 3) for t in tokens[i].tolist()}
    with torch.no_grad():
        one.model.embedding.weight[sorted(only)] = float("nan")
    told: List[Tensor] = []

    def note(logits_BTV: Tensor, nll_BT: Tensor) -> Tensor:
        told.append(torch.isfinite(nll_BT.mean(1)))
        return told[-1]

    before = one.weights()
    one.training.step(tokens, keys, note, lambda: None)
    assert told[0].tolist() == [True, False, True, True]
    after = one.weights()
    rows = [t for t in range(257) if t not in only]
    assert all(bool(torch.isfinite(after[n]).all()) for n in after if "embedding" not in n)
    assert bool(torch.isfinite(after["embedding.weight"][rows]).all())
    assert not same({"head": before["head.weight"]}, {"head": after["head.weight"]})


def test_a_hook_is_asked_where_it_is_said(make: Callable[..., Reader], make_model: Make) -> None:
    told: List[str] = []

    class Told(NoHook):
        def attach(self, *_: Any) -> float:
            told.append("attach")
            return 5.0

        def scored(self, batch: Any, logits_BTV: Tensor) -> None:
            told.append(f"scored {len(batch.keys_B)} {bool(batch.recent_B.all())}")

        def loss(self, nll_BT: Tensor, logits_BTV: Tensor, batch: Any) -> Tensor:
            told.append(f"loss {len(nll_BT)} {int(batch.recent_B.sum())}")
            return nll_BT

        def after_step(self, step: int) -> None:
            told.append(f"after {step}")

        def boundary(self, engine: Any) -> float:
            told.append("boundary")
            return 7.0

    cfg = make().cfg
    one, plain = (Reader(cfg, make_model(cfg.levels), 64, hook) for hook in (Told(), NoHook()))
    one.read()
    assert told == ["attach", "scored 4 True", "loss 8 4", "after 1"]
    plain.read()
    assert one.flops[0] == plain.flops[0] + 5.0
    one.training.boundary()
    assert told[-1] == "boundary"
    one.read()
    plain.read()
    assert one.flops[1] == plain.flops[1] + 7.0 and same(one.weights(), plain.weights()), "what costs is reported"
