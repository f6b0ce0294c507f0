"""What every registered optimizer promises: a new one is held to the same."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from nl_model import config
from nl_model.clock import LevelClock
from nl_model.config import LevelConfig, ModelConfig, OptimizerConfig
from nl_model.model import NestedLM
from nl_model.optim import OPTIMIZERS, build_optimizer, register
from nl_model.optim.levelwise import LevelOptimizers
from nl_model.weights import load_tensors, save_tensors

SHAPE, VOCAB = ModelConfig(dim=8, blocks=2, heads=2, context=4), 11
STEP = SHAPE.context
CASES: Dict[str, Dict[str, Any]] = {
    "adamw": {"name": "adamw", "lr": 0.01},
    "sgd": {"name": "sgd", "lr": 0.03},
    "muon": {"name": "muon", "lr": 0.05},
    "muon, nesterov": {"name": "muon", "lr": 0.05, "nesterov": True},
    "dgd": {"name": "dgd", "lr": 0.1},
    "delta_momentum": {"name": "delta_momentum", "lr": 0.05},
    "deep_momentum": {"name": "deep_momentum", "lr": 0.05},
    "deep_momentum, dot": {"name": "deep_momentum", "lr": 0.05, "objective": "dot"},
    "deep_momentum, linear": {"name": "deep_momentum", "lr": 0.05, "memory": "linear", "output": "identity"},
    "m3": {"name": "m3", "lr": 0.05, "slow_period": 3},
    "m3, literal": {"name": "m3", "lr": 0.001, "slow_period": 3, "literal": True, "adamw_scale": 1.0},
}
every_case = pytest.mark.parametrize("case", CASES)
Make = Callable[..., NestedLM]


class Driver:
    """The least that a learner does, on levels fast (every step) and slow (every second step)."""

    def __init__(self, make_model: Make, **settings: Any) -> None:
        optimizer = OptimizerConfig(**settings)
        levels = {
            "fast": LevelConfig(period=STEP, width=6, optimizer=optimizer),
            "slow": LevelConfig(period=2 * STEP, width=7, blocks="all", owner="pool", optimizer=optimizer),
        }
        self.model = make_model(levels, VOCAB, dtype=torch.float64, shape=SHAPE)
        self.clock, self.tokens = LevelClock.of(levels), 0
        self.optimizers = LevelOptimizers(self.model, list(levels))

    def run(self, sequences: Tensor) -> Driver:
        for sequence in sequences:
            self.loss(sequence[None]).backward()
            before, self.tokens = self.tokens, self.tokens + STEP
            self.optimizers.count(STEP)
            for name in self.clock.due(before, self.tokens):
                self.optimizers.write(name)
        return self

    def loss(self, sequences: Tensor) -> Tensor:
        return F.cross_entropy(self.model(sequences[:, :-1]).flatten(0, 1), sequences[:, 1:].flatten(), reduction="sum")

    def weights(self) -> List[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def stream(count: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (count, STEP + 1), generator=torch.Generator().manual_seed(seed))


def test_configurations_accept_what_is_registered() -> None:
    assert set(OPTIMIZERS) == set(config.OPTIMIZERS) == {settings["name"] for settings in CASES.values()}


def test_a_name_is_taken_once() -> None:
    with pytest.raises(AssertionError, match="two optimizers are called muon"):
        register("muon")(OPTIMIZERS["sgd"])


@every_case
def test_the_loss_of_a_fixed_sequence_falls(make_model: Make, case: str) -> None:
    driver, sequence = Driver(make_model, **CASES[case]), stream(1)
    before = float(driver.loss(sequence).detach())
    start = driver.weights()
    driver.run(sequence.expand(24, -1))
    assert float(driver.loss(sequence).detach()) < 0.7 * before
    assert all(not torch.equal(a, b) for a, b in zip(start, driver.weights(), strict=True)), "every parameter moves"


@every_case
def test_no_step_size_changes_nothing(make_model: Make, case: str) -> None:
    """Check 7: eta = 0 leaves the weights bit-identical."""
    driver = Driver(make_model, **CASES[case] | {"lr": 0.0, "weight_decay": 0.5})
    start = driver.weights()
    driver.run(stream(8))
    assert driver.optimizers.writes == {"fast": 8, "slow": 4}
    assert all(torch.equal(a, b) for a, b in zip(start, driver.weights(), strict=True))


@every_case
@pytest.mark.parametrize("cut", [5, 6])
def test_resuming_is_exact_to_the_bit(make_model: Make, tmp_path: Path, case: str, cut: int) -> None:
    """Check 9: through a file, in the middle of a period of `slow` and of M3's slow momentum, and at their ends."""
    sequences = stream(13)
    whole = Driver(make_model, **CASES[case]).run(sequences)
    first = Driver(make_model, **CASES[case]).run(sequences[:cut])
    state = first.optimizers.state()
    save_tensors(tmp_path / "state", state)
    second = Driver(make_model, **CASES[case])
    with torch.no_grad():
        for parameter, weight in zip(second.model.parameters(), first.weights(), strict=True):
            parameter.copy_(weight)
    second.tokens = first.tokens
    second.optimizers.load_state(load_tensors(tmp_path / "state")[0])
    again = second.optimizers.state()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) and again[key].dtype == state[key].dtype for key in state)
    second.run(sequences[cut:])
    assert all(torch.equal(a, b) for a, b in zip(whole.weights(), second.weights(), strict=True))


@every_case
def test_a_loaded_state_shares_no_memory_with_its_source(make_model: Make, case: str) -> None:
    """Check 9: a rollback to a state in memory stays exact after further steps."""
    driver = Driver(make_model, **CASES[case]).run(stream(5))
    kept = copy.deepcopy(driver.optimizers.state())
    driver.optimizers.load_state(kept)
    flat = {key: value.clone() for key, value in kept.items()}
    driver.run(stream(5, seed=2))
    assert all(torch.equal(flat[key], kept[key]) for key in kept)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("dgd")])
@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 6, 4)], ids=str)
def test_the_matrices_of_a_batch_do_not_see_each_other(case: str, shape: Any) -> None:
    """Check 8: a parameter (B, O, I) is written as B parameters (O, I) are."""
    cfg, generator = OptimizerConfig(**CASES[case]), torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradients = torch.randn((7, *shape), generator=generator, dtype=torch.float64)
    gradients *= torch.tensor([1.0, 30.0, 0.1], dtype=torch.float64)[:, None, None]
    together, apart = Parameter(start.clone()), [Parameter(matrix.clone()) for matrix in start]
    optimizers = [build_optimizer([together], cfg), build_optimizer(apart, cfg)]
    for gradient in gradients:
        together.grad = gradient.clone()
        for parameter, part in zip(apart, gradient, strict=True):
            parameter.grad = part.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(together, torch.stack([p.detach() for p in apart]), rtol=0, atol=1e-10)
    assert not torch.equal(together, start)


def test_dgd_without_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.name=dgd sees the inputs of layers"):
        build_optimizer([Parameter(torch.zeros(2, 2))], OptimizerConfig(name="dgd"))


@pytest.mark.parametrize("key", ["lr", "eps", "weight_decay", "adamw_scale", "slow_weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_numbers_that_are_none_are_named(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"optimizer\.{key}={value}"):
        OptimizerConfig(**{key: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clip": math.nan}, r"optimizer\.clip=nan"),
        ({"beta1": math.nan}, r"optimizer\.beta1=nan"),
        ({"beta3": 1.0}, r"beta3=1\.0"),
        ({"erase": 1.5}, r"optimizer\.erase=1\.5 must lie in \[0, 1\]"),
        ({"ns_steps": 0}, r"optimizer\.ns_steps=0"),
        ({"slow_period": 0}, r"optimizer\.slow_period=0"),
        ({"memory": "lstm"}, r"optimizer\.memory='lstm' is unknown; use one of linear, mlp"),
        ({"objective": "l1"}, r"optimizer\.objective='l1'"),
        ({"output": "relu"}, r"optimizer\.output='relu'"),
    ],
)
def test_wrong_settings_are_named(values: Dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**values)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("muon", "beta1", 0.5),
        ("muon", "nesterov", True),
        ("muon", "ns_steps", 2),
        ("dgd", "erase", 0.5),
        ("dgd", "reduction", "sum"),
        ("delta_momentum", "beta1", 0.5),
        ("delta_momentum", "erase", 0.5),
        ("delta_momentum", "literal", True),
        ("deep_momentum", "memory", "linear"),
        ("deep_momentum", "objective", "dot"),
        ("deep_momentum", "output", "identity"),
        ("deep_momentum", "erase", 0.5),
        ("deep_momentum", "ns_steps", 2),
        ("m3", "beta1", 0.5),
        ("m3", "beta3", 0.5),
        ("m3", "slow_period", 2),
        ("m3", "slow_weight", 0.1),
        ("m3", "literal", True),
        ("m3", "adamw_scale", 1.0),
        ("muon", "eps", 1e-2),
        ("muon", "beta2", 0.5),
        ("muon", "weight_decay", 0.5),
    ],
)
def test_settings_reach_the_optimizer(make_model: Make, name: str, key: str, value: Any) -> None:
    """Weights after a few writes differ between a setting's default and another value."""
    settings = {"name": name, "lr": 0.01, "slow_period": 3}
    plain, other = Driver(make_model, **settings).run(stream(8)), Driver(make_model, **settings | {key: value})
    other.run(stream(8))
    assert any(not torch.equal(a, b) for a, b in zip(plain.weights(), other.weights(), strict=True))
