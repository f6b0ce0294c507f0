"""One optimizer per level: the executable checks of nested learning that concern updates, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nl_model.clock import LevelClock
from nl_model.config import LevelConfig, ModelConfig, OptimizerConfig
from nl_model.model import NestedLM
from nl_model.optim.levelwise import LevelOptimizers, build_optimizer
from nl_model.weights import load_into, load_tensors, save_tensors

SHAPE, VOCAB = ModelConfig(dim=8, blocks=2, heads=2, context=3), 11
STEP = SHAPE.context
"""Tokens predicted by one sequence."""
SGD = OptimizerConfig(name="sgd", lr=0.05, beta1=0.0, clip=0.0, reduction="sum")
MOMENTUM = OptimizerConfig(name="sgd", lr=0.02, beta1=0.9, weight_decay=0.1, clip=0.0, reduction="sum")
ADAMW = OptimizerConfig(name="adamw", lr=0.01, weight_decay=0.1, clip=0.0)

Make = Callable[..., NestedLM]
MakeLevels = Callable[..., Dict[str, LevelConfig]]


@pytest.fixture
def build(make_model: Make, make_levels: MakeLevels) -> Callable[..., NestedLM]:
    """A float64 model whose levels' periods are given in sequences."""

    def make(optimizer: OptimizerConfig, fast: int = 1, medium: int = 4, slow: int = 12) -> NestedLM:
        levels = make_levels(fast * STEP, medium * STEP, slow * STEP, optimizer)
        return make_model(levels, VOCAB, dtype=torch.float64, shape=SHAPE)

    return make


def stream(count: int, seed: int = 1) -> Tensor:
    """(count, context + 1) tokens."""
    return torch.randint(VOCAB, (count, STEP + 1), generator=torch.Generator().manual_seed(seed))


def token_losses(model: NestedLM, sequences: Tensor) -> Tensor:
    """Loss per predicted token, flat, in the model's precision."""
    return F.cross_entropy(model(sequences[:, :-1]).flatten(0, 1), sequences[:, 1:].flatten(), reduction="none")


class Driver:
    """The least that a learner does: backward, count, write what is due. It writes all levels, the pool's too."""

    def __init__(self, model: NestedLM, tokens: int = 0) -> None:
        self.model, self.tokens = model, tokens
        self.clock = LevelClock.of(model.level_configs)
        self.optimizers = LevelOptimizers(model, list(model.level_names))

    def step(self, sequences: Tensor) -> None:
        token_losses(self.model, sequences).sum().backward()
        before, self.tokens = self.tokens, self.tokens + sequences[:, 1:].numel()
        self.optimizers.count(self.tokens - before)
        for name in self.clock.due(before, self.tokens):
            self.optimizers.write(name)

    def run(self, sequences: Tensor, calls: Sequence[int]) -> Driver:
        assert sum(calls) == len(sequences)
        for part in sequences.split(list(calls)):
            self.step(part)
        return self


def weights(model: NestedLM) -> Dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def greatest_difference(a: NestedLM, b: NestedLM) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_a_level_is_constant_between_its_boundaries(build: Make, optimizer: OptimizerConfig) -> None:
    """Check 1: with periods 1, 4, 12 over 24 steps each level changes at every multiple, and is bit-identical else."""
    driver = Driver(build(optimizer))
    changed: Dict[str, List[int]] = {name: [] for name in driver.model.level_names}
    for number, sequence in enumerate(stream(24), start=1):
        before = weights(driver.model)
        driver.step(sequence[None])
        for name, steps in changed.items():
            after = driver.model.parameters_of(name)
            same = [torch.equal(before[n], p) for n, p in after.items()]
            assert all(same) or not any(same), f"a write of {name} reaches all of its parameters"
            if not all(same):
                steps.append(number)
    assert changed == {"fast": list(range(1, 25)), "medium": [4, 8, 12, 16, 20, 24], "slow": [12, 24]}
    assert driver.optimizers.writes == {"fast": 24, "medium": 6, "slow": 2}


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM], ids=["plain", "momentum"])
def test_one_frequency_is_plain_sgd(build: Make, optimizer: OptimizerConfig) -> None:
    """Check 2: all periods one step + SGD = torch's SGD (and decay beside it), without any difference."""
    ours, theirs = build(optimizer, 1, 1, 1), build(optimizer, 1, 1, 1)
    reference = torch.optim.SGD(theirs.parameters(), lr=optimizer.lr, momentum=optimizer.beta1)
    driver = Driver(ours)
    for sequence in stream(10):
        driver.step(sequence[None])
        reference.zero_grad()
        token_losses(theirs, sequence[None]).sum().backward()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.mul_(1.0 - optimizer.lr * optimizer.weight_decay)
        reference.step()
    assert greatest_difference(ours, theirs) == 0.0
    assert greatest_difference(ours, build(optimizer)) > 1e-3, "something was learned"


def test_one_frequency_is_plain_adamw(build: Make) -> None:
    """Check 2: all periods one step + AdamW = torch's AdamW on the mean loss, to 1e-12."""
    ours, theirs = build(ADAMW, 1, 1, 1), build(ADAMW, 1, 1, 1)
    reference = torch.optim.AdamW(
        theirs.parameters(), lr=ADAMW.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=False, foreach=False
    )
    driver = Driver(ours)
    for sequence in stream(20):
        driver.step(sequence[None])
        reference.zero_grad()
        token_losses(theirs, sequence[None]).mean().backward()
        reference.step()
    assert greatest_difference(ours, theirs) < 1e-12
    assert greatest_difference(ours, build(ADAMW)) > 1e-2, "something was learned"


def test_equal_periods_are_one_large_batch(build: Make) -> None:
    """Check 3: all periods C + SGD + sum = one large-batch step on C tokens with summed loss."""
    ours, theirs = build(SGD, 6, 6, 6), build(SGD, 6, 6, 6)
    reference = torch.optim.SGD(theirs.parameters(), lr=SGD.lr)
    driver = Driver(ours)
    for period in stream(18).split(6):
        driver.run(period, [1] * 6)
        reference.zero_grad()
        token_losses(theirs, period).sum().backward()
        reference.step()
        assert greatest_difference(ours, theirs) < 1e-12


def test_a_write_is_the_sum_of_exactly_its_tokens_gradients(build: Make) -> None:
    """Check 4: a write equals -eta * the sum of exactly C per-token gradients at chunk-start weights."""
    driver = Driver(build(SGD, fast=2, medium=4, slow=12))
    sequences = stream(8)
    driver.run(sequences[:4], [1] * 4)
    start = weights(driver.model)
    at_start = build(SGD)
    load_into(at_start, start)
    names = list(at_start.parameters_of("fast"))
    parameters = [at_start.parameters_of("fast")[n] for n in names]
    sums, terms = [torch.zeros_like(p) for p in parameters], 0
    for loss in token_losses(at_start, sequences[4:6]):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        sums = [total + gradient for total, gradient in zip(sums, gradients, strict=True)]
        terms += 1
    driver.run(sequences[4:6], [1, 1])
    assert terms == driver.clock.periods["fast"] == 2 * STEP
    for name, total in zip(names, sums, strict=True):
        written = driver.model.parameters_of("fast")[name].detach() - start[name]
        assert total.abs().max() > 1e-3
        assert torch.allclose(written, -SGD.lr * total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("calls", [[1] * 24, [3, 1, 1, 2, 1] * 3, [2] * 12], ids=str)
def test_call_sizes_do_not_matter(build: Make, optimizer: OptimizerConfig, calls: List[int]) -> None:
    """Check 5: the same stream cut into other calls gives the same state, also with a call inside a period."""
    whole = Driver(build(optimizer, 4, 8, 24)).run(stream(24), [4] * 6)
    parts = Driver(build(optimizer, 4, 8, 24)).run(stream(24), calls)
    assert greatest_difference(whole.model, parts.model) < 1e-12
    assert whole.optimizers.writes == parts.optimizers.writes == {"fast": 6, "medium": 3, "slow": 1}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_no_step_size_changes_nothing(build: Make, name: str) -> None:
    """Check 7: eta = 0 leaves the logits bit-identical, whatever the other settings."""
    optimizer = OptimizerConfig(name=name, lr=0.0, weight_decay=0.5)
    driver, inputs = Driver(build(optimizer)), stream(5, seed=9)[:, :-1]
    before = driver.model(inputs)
    driver.run(stream(24), [1] * 24)
    assert torch.equal(driver.model(inputs), before)
    assert driver.optimizers.writes["slow"] == 2


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("cut", [5, 13, 24])
def test_resuming_is_exact_to_the_bit(build: Make, tmp_path: Path, optimizer: OptimizerConfig, cut: int) -> None:
    """Check 9: save, load, resume in the middle of a period equals an uninterrupted run."""
    sequences = stream(30)
    uninterrupted = Driver(build(optimizer)).run(sequences, [1] * 30)
    first = Driver(build(optimizer)).run(sequences[:cut], [1] * cut)
    state = first.optimizers.state()
    if cut % 4:
        assert state["grad/blocks.1.levels.medium.up.weight"].abs().sum() > 0, "this is the middle of a period"
    save_tensors(tmp_path / "weights", weights(first.model))
    save_tensors(tmp_path / "state", state, {"tokens": first.tokens})

    flat, meta = load_tensors(tmp_path / "state")
    second = Driver(build(optimizer), meta["tokens"])
    load_into(second.model, load_tensors(tmp_path / "weights")[0])
    second.optimizers.load_state(flat)
    assert second.optimizers.state().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in second.optimizers.state().items())

    second.run(sequences[cut:], [1] * (30 - cut))
    assert greatest_difference(second.model, uninterrupted.model) == 0.0
    assert second.optimizers.writes == uninterrupted.optimizers.writes
    assert second.optimizers.tokens == uninterrupted.optimizers.tokens


def test_a_loaded_state_shares_no_memory_with_what_it_was_loaded_from(build: Make) -> None:
    """Check 9: a rollback to a state in memory stays exact after further steps."""
    driver = Driver(build(ADAMW)).run(stream(6), [1] * 6)
    kept = {key: value.clone() for key, value in driver.optimizers.state().items()}
    flat = {key: value.clone() for key, value in kept.items()}
    driver.optimizers.load_state(flat)
    driver.run(stream(6, seed=5), [1] * 6)
    assert all(torch.equal(flat[key], kept[key]) for key in kept)


def test_mean_divides_by_the_tokens_of_the_period(build: Make) -> None:
    """The configured mean is the sum of check 4 over the number of tokens that were counted."""
    values: Dict[str, Any] = {"name": "sgd", "lr": 0.05, "beta1": 0.0, "clip": 0.0}
    summed = Driver(build(OptimizerConfig(**values, reduction="sum"), 4, 4, 4))
    mean = Driver(build(OptimizerConfig(**values, reduction="mean"), 4, 4, 4))
    start = weights(summed.model)
    summed.run(stream(4), [1] * 4)
    mean.run(stream(4), [1] * 4)
    for name, before in start.items():
        full, divided = weights(summed.model)[name] - before, weights(mean.model)[name] - before
        assert torch.allclose(divided * 4 * STEP, full, rtol=0, atol=1e-12)


def test_each_level_is_clipped_on_its_own(build: Make) -> None:
    optimizer = OptimizerConfig(name="sgd", lr=1.0, beta1=0.0, clip=1e-3, reduction="sum")
    driver = Driver(build(optimizer, 2, 2, 2))
    start = weights(driver.model)
    driver.run(stream(2), [1, 1])
    for name in driver.model.level_names:
        moved = [(p - start[n]).detach().flatten() for n, p in driver.model.parameters_of(name).items()]
        assert float(torch.cat(moved).norm()) == pytest.approx(1e-3, rel=1e-4)


def test_discarding_forgets_the_sum_and_its_tokens(build: Make) -> None:
    driver = Driver(build(SGD, 2, 4, 12)).run(stream(1), [1])
    driver.optimizers.discard("fast")
    assert driver.optimizers.tokens == {"fast": 0, "medium": STEP, "slow": STEP}
    assert all(p.grad is None for p in driver.model.parameters_of("fast").values())
    assert all(p.grad is not None for p in driver.model.parameters_of("medium").values())
    with pytest.raises(AssertionError, match="saw no token"):
        driver.optimizers.write("fast")


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weight_decay_is_decoupled(name: str) -> None:
    """Without a gradient a weight shrinks by lr * decay per write; momentum does not pile the decay up."""
    weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    optimizer = build_optimizer([weight], OptimizerConfig(name=name, lr=0.1, weight_decay=0.5))
    for _ in range(3):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 0.95**3))
