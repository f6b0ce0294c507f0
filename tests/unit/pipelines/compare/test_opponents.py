"""Opponents as hooks on online training: each does what its paper says, costs what it claims, resumes to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Callable, Dict, List, Tuple

import numpy as np
import pytest
import torch
from torch import Tensor

from nl_model.flops import full_step_flops
from nl_model.model import NestedLM
from pipelines.compare.opponents import OPPONENTS, build_hook, hook_settings
from pipelines.compare.opponents.der import Der
from pipelines.compare.opponents.ewc import Ewc, sample_size
from pipelines.compare.opponents.lora import Lora
from pipelines.compare.opponents.lwf import Lwf
from pipelines.compare.opponents.mer import Mer
from pipelines.config.schema import Config, SleepConfig, WakeConfig
from pipelines.experience import Record
from pipelines.experience.memory import MemoryStore
from pipelines.sleep.training import Batch
from pipelines.wake.hooks import Hook, NoHook
from pipelines.wake.online_training import OnlineTraining

Make = Callable[..., NestedLM]
BASE, B, CONTEXT = 12, 2, 16


@pytest.fixture
def cfg(make_config: Callable[..., Config]) -> Config:
    return make_config(wake=WakeConfig(batch=B, writes="all", trained=2.0, replay=0.5), sleep=SleepConfig(batch=4))


class Learner:
    """Online training over a store in memory that grows with what it reads."""

    def __init__(self, cfg: Config, make_model: Make, hook: Hook, read: int = 0) -> None:
        self.store = MemoryStore(CONTEXT, "uint16")
        self.store.append([record(-1 - i) for i in range(BASE)] + [record(i) for i in range(read)])
        self.key, self.model = read, make_model(cfg.levels)
        self.training = OnlineTraining(self.model, cfg, self.store.at, hook)
        self.flops: List[float] = []

    def read(self, steps: int) -> None:
        for _ in range(steps):
            records = [record(self.key + i) for i in range(B)]
            tokens = torch.from_numpy(np.stack([r.tokens for r in records]).astype(np.int64))

            def note(logits: Tensor, nll: Tensor) -> Tensor:
                return torch.isfinite(nll.mean(1))

            def wait(records: List[Record] = records) -> None:
                self.store.append(records)

            self.flops.append(self.training.step(tokens, np.array([r.key for r in records]), note, wait))
            self.key += B

    def weights(self) -> Dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def record(key: int) -> Record:
    tokens = np.random.default_rng(key + 100).integers(0, 257, CONTEXT + 1).astype(np.uint16)
    return Record(key=key, source=f"s{key % 3}", kind="base" if key < 0 else "real", surprise=1.0, tokens=tokens)


def same(a: Dict[str, Tensor], b: Dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", list(OPPONENTS))
def test_a_resumed_learner_is_the_uninterrupted_one_to_the_bit(name: str, cfg: Config, make_model: Make) -> None:
    whole, first = (Learner(cfg, make_model, build_hook(name, {})) for _ in range(2))
    for one, ways in ((whole, (9, 12)), (first, (9, 3))):
        one.read(ways[0])
        one.training.boundary()
        one.read(ways[1])
    state, weights, read = first.training.state(), first.weights(), first.key
    second = Learner(cfg, make_model, build_hook(name, {}), read)
    second.model.load_state_dict(weights, strict=False)
    second.training.load_state(state)
    second.read(9)
    assert same(second.weights(), whole.weights()) and same(second.training.state(), whole.training.state())
    assert second.flops == whole.flops[12:]


@pytest.mark.parametrize("name", [name for name in OPPONENTS if name != "none"])
def test_an_opponent_trains_otherwise_than_nobody(name: str, cfg: Config, make_model: Make) -> None:
    found = []
    for hook in (NoHook(), build_hook(name, {})):
        one = Learner(cfg, make_model, hook)
        one.read(24)
        found.append(one.weights())
    assert not same(*found)


@pytest.mark.parametrize("name", list(OPPONENTS))
def test_what_a_hook_claims_to_cost_is_what_is_counted(name: str, cfg: Config, make_model: Make) -> None:
    hook = build_hook(name, {})
    costs = hook.costs(cfg, 257)
    one = Learner(cfg, make_model, hook)
    period = min(level.period for level in cfg.levels.values() if level.owner == "pool")
    one.read(1)
    one.training.owed = 0.0  # the base was weighed once, before the stream
    one.flops.clear()
    for _ in range(3):
        one.read(period // (B * CONTEXT))
        one.training.boundary()
    one.read(1)
    tokens = 3 * period
    full = full_step_flops(cfg.model, cfg.levels, 257)
    expected = tokens * (2.0 * (full + costs.trained) + costs.streamed)
    last = 2.0 * B * CONTEXT * (full + costs.trained)
    assert sum(one.flops) == pytest.approx(expected + last, rel=1e-9)


def test_ewc_pulls_weights_back_by_what_they_were_worth(cfg: Config, make_model: Make) -> None:
    drift = {}
    for strength in (0.0, 1e4):
        one = Learner(cfg, make_model, Ewc(strength))
        before = one.weights()
        one.read(16)
        drift[strength] = sum(float((p - before[n]).square().sum()) for n, p in one.weights().items())
    assert drift[1e4] < 0.5 * drift[0.0]
    hook = Ewc(2.0)
    one = Learner(cfg, make_model, hook)
    assert len(hook.keys) == 0 and hook.fisher, "the base is weighed before anything is learned"
    mean = sum(float(f.sum()) for f in hook.fisher.values()) / sum(f.numel() for f in hook.fisher.values())
    assert mean == pytest.approx(1.0, rel=1e-4)
    penalty = hook.penalty()
    assert penalty is not None and float(penalty.detach()) == 0.0
    with torch.no_grad():
        one.model.head.weight.add_(0.1)
    expected = 0.01 * float(hook.fisher["head.weight"].sum())
    moved = hook.penalty()
    assert moved is not None and float(moved.detach()) == pytest.approx(expected, rel=1e-4)


def test_ewc_weighs_text_by_key_whatever_its_order(cfg: Config, make_model: Make) -> None:
    hooks = [Ewc() for _ in range(2)]
    for hook, order in zip(hooks, (range(40), reversed(range(40))), strict=True):
        hook.attach(make_model(cfg.levels), cfg, MemoryStore(CONTEXT, "uint16").at)
        for key in order:
            one = torch.from_numpy(record(key).tokens.astype(np.int64))[None]
            hook.scored(Batch(one, torch.ones(1, dtype=torch.bool), np.array([key])), torch.empty(0))
    assert len(hooks[0].keys) == sample_size(cfg) and sorted(hooks[0].keys) == sorted(hooks[1].keys)


def test_lwf_holds_to_what_the_model_was_at_the_last_mark(cfg: Config, make_model: Make) -> None:
    hook = Lwf(0.5)
    one = Learner(cfg, make_model, hook)
    before = one.weights()
    one.read(4)
    assert same({n: p.detach() for n, p in hook.old.named_parameters()}, before)
    with torch.no_grad():
        one.model.head.weight.mul_(3.0)
    (logits, batch), nll = _pass(one.model), torch.full((B, CONTEXT), 9.0)
    old, new = hook.old(batch.tokens_BS[:, :-1]).log_softmax(-1), logits.detach().log_softmax(-1)
    divergence = (old.exp() * (old - new)).sum(-1)
    assert float(divergence.min()) > 1e-2, "so far from the old model that the order of the two matters"
    torch.testing.assert_close(hook.loss(nll, logits, batch).detach(), (nll + divergence) / 2)
    one.training.boundary()
    assert same({n: p.detach() for n, p in hook.old.named_parameters()}, one.weights())
    torch.testing.assert_close(hook.loss(nll, logits, batch).detach(), nll / 2)


def _pass(model: NestedLM, keys: Tuple[int, ...] = (0, 1), old: bool = False) -> Tuple[Tensor, Batch]:
    tokens = torch.from_numpy(np.stack([record(key).tokens for key in keys]).astype(np.int64))
    batch = Batch(tokens, torch.full((len(keys),), not old), np.array(keys))
    return model(tokens[:, :-1]), batch


def test_der_learns_replayed_text_with_what_was_said_of_it(cfg: Config, make_model: Make) -> None:
    hook = Der(1.0, top=8)
    one = Learner(cfg, make_model, hook)
    logits, batch = _pass(one.model)
    hook.scored(batch, logits.detach())
    nll = torch.full((B, CONTEXT), 5.0)
    assert torch.equal(hook.loss(nll, logits, batch), nll), "new text is learned plainly"
    logits, batch = _pass(one.model, (0, -3), old=True)
    loss = hook.loss(nll, logits, batch).detach()
    assert float(loss[0].abs().max()) < 2e-2, "the model says what it said, but for sixteen bits"
    assert torch.equal(loss[1], nll[1]), "of the base nobody said anything"
    assert hook.costs(cfg, 257).stored == 4 * 8


def test_der_trains_in_half_precision(cfg: Config, make_model: Make) -> None:
    halves = replace(cfg, compute=replace(cfg.compute, precision="bf16"))
    learner = Learner(halves, make_model, Der(0.5))
    learner.read(40)
    assert learner.training.hook.stored, "nothing was replayed with what was said of it"
    assert all(torch.isfinite(weight).all() for weight in learner.weights().values())


def test_der_keeps_no_more_than_replay_holds(make_config: Callable[..., Config], make_model: Make) -> None:
    cfg = make_config(sleep=SleepConfig(batch=4, replay_bytes=5 * CONTEXT))
    kept = []
    for order in (range(0, 40, 2), range(38, -1, -2)):
        hook = Der()
        hook.attach(make_model(cfg.levels), cfg, MemoryStore(CONTEXT, "uint16").at)
        for key in order:
            logits, batch = _pass(make_model(cfg.levels), (key, key + 1))
            hook.scored(batch, logits.detach())
        hook.boundary(None)  # type: ignore[arg-type]
        kept.append(sorted(hook.stored))
    assert len(kept[0]) == 5 and kept[0] == kept[1]


def test_mer_goes_back_most_of_the_way(cfg: Config, make_model: Make) -> None:
    hook = Mer(0.25, every=4)
    one, plain = Learner(cfg, make_model, hook), Learner(cfg, make_model, NoHook())
    before = one.weights()
    one.read(4)
    plain.read(4)
    for name, after in plain.weights().items():
        torch.testing.assert_close(one.weights()[name], before[name].lerp(after, 0.25), rtol=1e-5, atol=1e-6)


def test_lora_moves_maps_within_its_rank_and_nothing_else(cfg: Config, make_model: Make) -> None:
    hook = Lora(rank=2)
    one = Learner(cfg, make_model, hook)
    before = one.weights()
    one.read(6)
    after, maps = one.weights(), {f"blocks.{name}.weight" for name in hook.maps}
    for name in after:
        change = after[name] - before[name]
        if name in maps:
            assert 0 < int(torch.linalg.matrix_rank(change, rtol=1e-3)) <= 2, name
        else:
            assert torch.equal(after[name], before[name]), name
    one.training.boundary()
    assert same(one.weights(), after), "merging changes nothing"
    assert all(float(b.detach().abs().max()) == 0 for _, b in hook.adapters.values())


def test_loras_gradient_is_that_of_the_usual_form(cfg: Config, make_model: Make) -> None:
    hook = Lora(rank=2)
    one = Learner(cfg, make_model, hook)
    one.read(2)
    name, module = next(iter(hook.maps.items()))
    a, b = hook.adapters[name]
    x = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(0))
    found = module(x)
    torch.testing.assert_close(found, x @ (hook.rests[name] + b @ a).T, rtol=1e-5, atol=1e-5)
    usual = x @ hook.rests[name].T + x @ a.T @ b.T
    theirs = torch.autograd.grad(usual.sum(), [a, b])
    for mine, other in zip(torch.autograd.grad(found.sum(), [a, b]), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ewc", {"strenght": "1"}, r"hook\.strenght is unknown; did you mean hook\.strength\?"),
        ("ewc", {"strength": "-1"}, r"hook\.strength=-1\.0 must be at least 0"),
        ("lora", {"rank": "x"}, r"hook\.rank='x' must be a number, such as 16"),
        ("none", {"a": "1"}, r"hook\.a is unknown; none has no settings"),
    ],
)
def test_wrong_settings_are_named(name: str, settings: Dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_hook(name, settings)
    assert hook_settings("mer") == {"step": 0.7, "every": 16}
