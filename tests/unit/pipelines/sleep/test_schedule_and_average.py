"""A trainer that never cools down: a constant step size over rounds, and the average of weights that is released."""

from __future__ import annotations

import math
from typing import Callable, Dict, Iterator, List, Tuple

import pytest
import torch
from torch import Tensor

from nl_model.config import LevelConfig, OptimizerConfig
from nl_model.model import NestedLM
from pipelines.config.sleep import SleepConfig
from pipelines.sleep.average import WeightAverage
from pipelines.sleep.base import TrueTokens
from pipelines.sleep.engine import HeldState, LocalEngine
from pipelines.sleep.schedule import Schedule, learning_rate
from pipelines.sleep.training import ALONE, Batch, Place, Progress, train


def test_a_cosine_spans_a_round_and_a_constant_warms_up_once() -> None:
    cfg = SleepConfig(optimizer=OptimizerConfig(lr=0.4), warmup=4, schedule="cosine")
    cosine = Schedule.of_round(cfg, 50, done=7)
    assert [cosine.lr(step) for step in range(50)] == [learning_rate(0.4, step, 50) for step in range(50)]
    constant = SleepConfig(optimizer=OptimizerConfig(lr=0.4), warmup=4, schedule="constant")
    first, second = Schedule.of_round(constant, 3, 0), Schedule.of_round(constant, 3, 3)
    rates = [one.lr(step) for one in (first, second) for step in range(3)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4]), "the warm-up goes on where the round before ended"
    assert Schedule.of_round(constant, 9, 100).lr(0) == 0.4


class Weights:
    """An engine of which only weights are asked."""

    def __init__(self, value: float) -> None:
        self.value = value

    def weights(self) -> Iterator[Tuple[str, Tensor]]:
        yield "w", torch.tensor([self.value])


def test_an_average_forgets_by_its_horizon() -> None:
    average = WeightAverage({"w": torch.tensor([1.0])}, horizon=8, every=2)
    engine = Weights(0.0)
    for step in range(1, 17):
        average.after_step(engine, step)  # type: ignore[arg-type]
    assert average.samples == 8 and float(average.weights["w"]) == pytest.approx(math.exp(-2.0), rel=1e-5)


def test_an_average_is_of_its_own_and_constant_weights_stay() -> None:
    start = {"w": torch.tensor([3.0])}
    average = WeightAverage(start, horizon=5, every=1)
    average.sample(Weights(3.0))  # type: ignore[arg-type]
    assert float(average.weights["w"]) == 3.0
    average.sample(Weights(4.0))  # type: ignore[arg-type]
    assert float(start["w"]) == 3.0 < float(average.weights["w"]) < 4.0


class Tokens:
    """Batches that depend on the step alone."""

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset

    def batch(self, step: int, place: Place = ALONE) -> Batch:
        generator = torch.Generator().manual_seed(self.offset + step)
        tokens = torch.randint(257, (2, 17), generator=generator)
        return Batch(tokens, torch.ones(2, dtype=torch.bool), torch.arange(2).numpy())


MakeModel = Callable[..., NestedLM]
MakeLevels = Callable[..., Dict[str, LevelConfig]]


def test_two_rounds_with_what_was_carried_are_one_training(make_model: MakeModel, make_levels: MakeLevels) -> None:
    cfg, cpu = OptimizerConfig(lr=1e-2), torch.device("cpu")
    sleep = SleepConfig(optimizer=cfg, warmup=4, schedule="constant")
    whole = make_model(make_levels())
    train(LocalEngine(whole, cfg), TrueTokens(), Tokens(), Schedule.of_round(sleep, 12, 0), cpu)
    carried: List[HeldState] = []
    model = make_model(make_levels())
    for done in (0, 6):
        engine = LocalEngine(model, cfg, state=carried[-1] if carried else None)
        train(engine, TrueTokens(), Tokens(done), Schedule.of_round(sleep, 6, done), cpu)
        carried.append(HeldState.of(engine))
        model = make_model(make_levels(), seed=9)
        model.load_state_dict(carried[-1].weights())
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))


def test_a_training_shorter_than_two_samples_counts_too(make_model: MakeModel, make_levels: MakeLevels) -> None:
    model, cpu = make_model(make_levels()), torch.device("cpu")
    average = WeightAverage({n: p.detach() for n, p in model.named_parameters()}, horizon=10, every=100)
    train(
        LocalEngine(model, OptimizerConfig(lr=1e-2)),
        TrueTokens(),
        Tokens(),
        Schedule("constant", 1e-2, 3),
        cpu,
        average=average,
    )
    assert average.samples == 1


def test_an_attempt_that_goes_on_behind_the_last_sample_takes_none_more(
    make_model: MakeModel, make_levels: MakeLevels
) -> None:
    model, cpu = make_model(make_levels()), torch.device("cpu")
    average = WeightAverage({n: p.detach() for n, p in model.named_parameters()}, horizon=10, every=4)
    engine, schedule = LocalEngine(model, OptimizerConfig(lr=1e-2)), Schedule("constant", 1e-2, 6)
    # Its first attempt died after step 5: what was sampled at step 4 is in the state that it left.
    train(engine, TrueTokens(), Tokens(), schedule, cpu, average=average, progress=Progress(5))
    assert average.samples == 0


def test_a_state_that_is_kept_stays_as_it_is(make_model: MakeModel, make_levels: MakeLevels) -> None:
    cfg, cpu = OptimizerConfig(lr=1e-2), torch.device("cpu")
    first = LocalEngine(make_model(make_levels()), cfg)
    train(first, TrueTokens(), Tokens(), Schedule("constant", 1e-2, 2), cpu)
    held, after = HeldState.of(first), []
    before = {name: tensor.clone() for name, tensor in held.tensors.items()}
    for _ in range(2):  # a round that was rejected, and the next one from the same release
        model = make_model(make_levels())
        train(LocalEngine(model, cfg, state=held), TrueTokens(), Tokens(2), Schedule("constant", 1e-2, 2), cpu)
        after.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(held.tensors[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))
