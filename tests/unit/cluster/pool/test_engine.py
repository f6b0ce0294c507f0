"""The student's engine in a group of one: precision, passes, checkpointed activations, its state on disk and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Tuple

import pytest
import torch
from torch import Tensor

from nl_model.config import LevelConfig, OptimizerConfig
from nl_model.model import NestedLM, autocast
from pipelines.config.pool import PoolConfig

ADAMW, SGD = OptimizerConfig(lr=1e-2), OptimizerConfig(name="sgd", lr=1e-1)
SHARE, STEPS = 4, 3
MakeModel = Callable[..., NestedLM]


@pytest.fixture
def build(group: None, make_model: MakeModel, make_levels: Callable[..., Dict[str, LevelConfig]]) -> Iterator[Any]:
    """Engines over models whose first weights are drawn from a seed; closed in the end."""
    from cluster.pool.engine import DeepSpeedEngine

    made = []

    def engine(
        pool: PoolConfig, optimizer: OptimizerConfig = ADAMW, seed: int = 0, frozen: Tuple[str, ...] = (), **more: Any
    ) -> DeepSpeedEngine:
        model = make_model(make_levels(), seed=seed)
        if state := more.get("state"):
            model.load_state_dict(state.weights())
        made.append(DeepSpeedEngine(model, optimizer, pool, SHARE, frozen, **more))
        return made[-1]

    yield engine
    for one in made:
        one.close()


def sequences(step: int) -> Tensor:
    return torch.randint(257, (SHARE, 17), generator=torch.Generator().manual_seed(step))


def train(engine: Any, steps: range, precision: str = "fp32") -> float:
    """Some steps; returns the last loss."""
    last = 0.0
    for step in steps:
        tokens, losses = sequences(step), []
        for i in range(engine.passes):
            part = tokens[i :: engine.passes]
            with autocast(part.device, precision):
                logits = engine(part[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten())
            engine.backward(loss)
            losses.append(float(loss.detach()))
        engine.step(1e-2)
        last = sum(losses) / len(losses)
    return last


def state_of(engine: Any) -> Dict[str, Tensor]:
    return dict(engine.state())


def assert_same(found: Dict[str, Tensor], expected: Dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_checkpointed_activations_change_nothing(build: Any, stage: int) -> None:
    plain, spared = (build(PoolConfig(zero_stage=stage, activation_checkpointing=on)) for on in (False, True))
    assert train(spared, range(STEPS)) == train(plain, range(STEPS))
    assert_same(state_of(spared), state_of(plain))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_step_in_passes_is_the_step_in_one(build: Any, stage: int) -> None:
    whole, parts = (build(PoolConfig(zero_stage=stage, micro_batch=size), SGD) for size in (0, 2))
    assert (whole.passes, parts.passes) == (1, 2)
    assert train(parts, range(STEPS)) == pytest.approx(train(whole, range(STEPS)), abs=1e-6)
    assert_same(state_of(parts), state_of(whole), 1e-6)


@pytest.mark.parametrize(
    ("optimizer", "before", "after"),
    [(ADAMW, 1, 3), (ADAMW, 3, 1), (ADAMW, 2, 0), (ADAMW, 2, 2), (SGD, 0, 3), (replace(SGD, beta1=0.0), 1, 2)],
    ids=["1 to 3", "3 to 1", "2 to 0", "2 to 2", "sgd, 0 to 3", "no momentum, 1 to 2"],
)
def test_a_state_moves_between_stages(
    build: Any, tmp_path: Path, optimizer: OptimizerConfig, before: int, after: int
) -> None:
    from cluster.storage.training_state import read_state, write_state

    first = build(PoolConfig(zero_stage=before), optimizer)
    train(first, range(STEPS))
    write_state(tmp_path / "state", first, {"round": 1}, STEPS, {"trained": 2})
    stored = read_state(tmp_path / "state")
    assert stored is not None
    assert (stored.key, stored.step, stored.progress) == ({"round": 1}, STEPS, [{"trained": 2}])
    second = build(PoolConfig(zero_stage=after), optimizer, seed=1, state=stored)
    expected = state_of(first)
    assert_same(state_of(second), expected)
    assert len(expected) == len(first.names) * (1 + {"adamw": 2, "sgd": 1}[optimizer.name] * bool(optimizer.beta1))
    end = range(STEPS, 2 * STEPS)
    assert train(second, end) == pytest.approx(train(first, end), abs=0.0 if before == after else 1e-6)
    assert second.counters() == first.counters()
    assert_same(state_of(second), state_of(first), 0.0 if before == after else 1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_weights_have_exact_masters(build: Any, tmp_path: Path, stage: int) -> None:
    from cluster.storage.training_state import read_state, write_state

    pool = PoolConfig(zero_stage=stage, bf16_weights=True)
    frozen = ("blocks.1.levels.fast.up.weight",)
    exact = dict(build(PoolConfig(zero_stage=stage), frozen=frozen).weights())
    engine = build(pool, frozen=frozen)
    assert next(engine.engine.module.parameters()).dtype == torch.bfloat16
    assert_same(dict(engine.weights()), exact)
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in exact.values())
    train(engine, range(STEPS), "bf16")
    after = dict(engine.weights())
    assert torch.equal(after[frozen[0]], exact[frozen[0]])
    assert all(not torch.equal(after[name], exact[name]) for name in engine.names if name not in frozen)
    write_state(tmp_path / "state", engine, {})
    again = build(pool, seed=1, frozen=frozen, state=read_state(tmp_path / "state"))
    assert_same(state_of(again), state_of(engine))
    end = range(STEPS, 2 * STEPS)
    assert train(again, end, "bf16") == train(engine, end, "bf16")
    assert_same(state_of(again), state_of(engine))


def test_moments_alone_leave_the_weights(build: Any, tmp_path: Path) -> None:
    from cluster.storage.training_state import read_state, write_state

    first = build(PoolConfig(zero_stage=1))
    train(first, range(STEPS))
    write_state(tmp_path / "state", first, {}, weights=False)
    stored = read_state(tmp_path / "state")
    assert stored is not None and stored.weights() == {}
    second = build(PoolConfig(zero_stage=3))
    expected = dict(second.weights())
    second._load_moments(stored)
    assert_same(dict(second.weights()), expected)
    assert_same(dict(second.state(weights=False)), dict(first.state(weights=False)))


def test_a_damaged_state_is_none(build: Any, tmp_path: Path) -> None:
    from cluster.storage.training_state import RoundStates, read_state

    engine, key = build(PoolConfig()), {"round": 4}
    states = RoundStates(tmp_path, key, every=2)
    assert states.newest() is None
    for step in (1, 2, 3, 4):
        train(engine, range(step - 1, step))
        states.after(engine, step, 6, {"trained": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"], "older states are removed"
    newest = states.newest()
    assert newest is not None and newest.step == 4 and newest.intact(0, 1)
    file = next(newest.directory.glob("*.safetensors"))
    payload = file.read_bytes()
    file.write_bytes(payload[:-1] + bytes([payload[-1] ^ 1]))
    assert read_state(newest.directory) is None
    assert states.newest() is None and not tmp_path.exists(), "what is of no use is removed"


def test_the_state_of_another_round_is_removed(build: Any, tmp_path: Path) -> None:
    from cluster.storage.training_state import RoundStates

    engine = build(PoolConfig())
    train(engine, range(1))
    RoundStates(tmp_path / "pool", {"round": 1}, 1).after(engine, 1, 2, {"trained": 1})
    assert RoundStates(tmp_path / "pool", {"round": 1}, 0).newest() is None, "switched off"
    assert RoundStates(tmp_path / "pool", {"round": 1}, 1).newest() is not None
    assert RoundStates(tmp_path / "pool", {"round": 2}, 1).newest() is None
    assert not (tmp_path / "pool").exists()


@pytest.mark.parametrize(("numel", "world"), [(12, 3), (10, 3), (7, 2), (3, 4)])
def test_parts_are_equal_and_together_the_whole(numel: int, world: int) -> None:
    from cluster.pool.engine import equal_part

    whole, size = torch.arange(1.0, numel + 1).view(1, numel), -(-numel // world)
    parts = [equal_part(whole, size, rank) for rank in range(world)]
    assert {part.shape for part in parts} == {(size,)}
    joined = torch.cat(parts)
    assert torch.equal(joined[:numel], whole.flatten()) and not joined[numel:].any()


def test_progress_is_shared_out_anew_over_other_ranks() -> None:
    from cluster.storage.training_state import TrainingState

    parts = [{"trained": 7, "losses": {"total": [1.0]}}, {"trained": 2, "losses": {"total": [2.0]}}]
    state = TrainingState(Path(), {}, 1, {}, parts, {}, {})
    assert [state.progress_of(rank, 2) for rank in (0, 1)] == parts
    assert state.progress_of(0, 1) == {"trained": 9, "losses": {"total": [1.0]}}
    assert [state.progress_of(rank, 4)["trained"] for rank in range(4)] == [3, 2, 2, 2]
