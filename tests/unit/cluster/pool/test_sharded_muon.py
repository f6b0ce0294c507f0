"""Muon as the pool's optimizer: every stage and number of ranks computes what one process does, and goes on from it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Optional, Set

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from nl_model.config import LevelConfig, ModelConfig, OptimizerConfig
from nl_model.model import NestedLM, autocast
from pipelines.config.pool import PoolConfig
from pipelines.sleep.engine import HeldState, LocalEngine

MUON = OptimizerConfig(name="muon", lr=1e-2)
AHEAD = replace(MUON, nesterov=True, weight_decay=0.1)
VOCAB, BATCH, STEPS, LR = 61, 4, 10, 2e-2
HALF = STEPS // 2


def model_of(seed: int = 0) -> NestedLM:
    """An odd number of weights in matrices, whose sizes are odd too: no boundary between ranks falls between two."""
    levels = {
        "fast": LevelConfig(period=64, width=5),
        "slow": LevelConfig(period=512, width=7, blocks="all", owner="pool"),
    }
    shape = ModelConfig(dim=8, blocks=3, heads=2, context=16, wiring="independent")
    return NestedLM(shape, levels, VOCAB).reset_parameters(seed)


def matrices() -> Set[str]:
    """Names of what Muon orthogonalises."""
    tables = {"embedding.weight", "head.weight"}
    return {name for name, parameter in model_of().named_parameters() if parameter.dim() > 1} - tables


def train(engine: Any, steps: range, rank: int = 0, world: int = 1, precision: str = "fp32") -> None:
    """Steps on this rank's share of batches that are the same for any number of ranks."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCAB, (BATCH, 17), generator=generator)[rank::world]
        for part in tokens.chunk(engine.passes):
            with autocast(part.device, precision):
                logits = engine(part[:, :-1])
            engine.backward(cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten()))
        engine.step(LR)


@contextmanager
def pooled(
    stage: int, optimizer: OptimizerConfig = MUON, state: Any = None, share: int = BATCH, **more: Any
) -> Iterator[Any]:
    """An engine of the pool; with a state it goes on from that."""
    from cluster.pool.engine import DeepSpeedEngine

    frozen, model = more.pop("frozen", ()), model_of(seed=0 if state is None else 1)
    if state is not None:
        model.load_state_dict(state.weights())
    engine = DeepSpeedEngine(model, optimizer, PoolConfig(zero_stage=stage, **more), share, frozen, state)
    yield engine
    engine.close()


def local(optimizer: OptimizerConfig, steps: range, state: Optional[HeldState] = None, **more: Any) -> HeldState:
    """What one process without DeepSpeed comes to."""
    model = model_of(seed=0 if state is None else 1)
    if state is not None:
        model.load_state_dict(state.weights())
    engine = LocalEngine(model, optimizer, state=state, **more)
    train(engine, steps)
    return HeldState.of(engine)


def assert_same(found: Dict[str, Tensor], expected: Dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("optimizer", [MUON, AHEAD], ids=["plain", "nesterov, decay"])
@pytest.mark.parametrize(("stage", "tolerance"), [(0, 0.0), (1, 1e-5), (2, 1e-5)])
def test_every_stage_is_one_process(group: None, stage: int, tolerance: float, optimizer: OptimizerConfig) -> None:
    expected = local(optimizer, range(STEPS))
    with pooled(stage, optimizer) as engine:
        train(engine, range(STEPS))
        assert_same(dict(engine.state()), expected.tensors, tolerance)
        assert engine.counters() == expected.counters == {"step": STEPS}


def test_moments_are_those_of_the_kind(group: None) -> None:
    with pooled(2) as engine:
        train(engine, range(1))
        moments = [name for name, _ in engine.state(weights=False)]
    assert {name for name in moments if name.startswith("momentum/")} == {f"momentum/{name}" for name in matrices()}
    others = set(engine.names) - matrices()
    assert len(others) > 2, "vectors, and the tables"
    assert len(moments) == len(matrices()) + 2 * len(others)


@pytest.mark.parametrize("kind", ["matrices", "others"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_kind_alone(group: None, stage: int, kind: str) -> None:
    """Only matrices train, or none; then all do."""
    names = {name for name, _ in model_of().named_parameters()}
    frozen = tuple(sorted(names - matrices() if kind == "matrices" else matrices()))
    expected = local(MUON, range(HALF), frozen=frozen)
    with pooled(stage, frozen=frozen) as engine:
        train(engine, range(HALF))
        assert_same(dict(engine.state()), expected.tensors, 1e-5)
        assert engine.counters() == expected.counters == ({} if kind == "matrices" else {"step": HALF})
    after = local(MUON, range(HALF, STEPS), expected)
    with pooled(stage, state=expected) as engine:
        train(engine, range(HALF, STEPS))
        assert_same(dict(engine.state()), after.tensors, 1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_weights_have_exact_masters(group: None, stage: int) -> None:
    pool = {"bf16_weights": True, "micro_batch": 2}
    with pooled(stage, **pool) as engine:
        train(engine, range(HALF), precision="bf16")
        half = HeldState.of(engine)
        train(engine, range(HALF, STEPS), precision="bf16")
        end = dict(engine.state())
    with pooled(stage, state=half, **pool) as engine:
        assert_same(dict(engine.state()), half.tensors)
        train(engine, range(HALF, STEPS), precision="bf16")
        assert_same(dict(engine.state()), end)


def test_stage_3_is_refused_by_the_configuration() -> None:
    from pipelines.config.load import load_config

    load_config("smoke", ["sleep.optimizer.name=muon", "pool.zero_stage=2"])
    with pytest.raises(
        ValueError, match=r"sleep\.optimizer\.name=muon .* pool\.zero_stage=3 .* use pool\.zero_stage=0"
    ):
        load_config("smoke", ["sleep.optimizer.name=muon", "pool.zero_stage=3"])
    with pytest.raises(ValueError, match=r"sleep\.optimizer\.name='m3'"):
        load_config("smoke", ["sleep.optimizer.name=m3"])


def one_of_two(rank: int, port: int, folder: Path) -> None:
    """Rank of a pool of two: from the beginning at every stage, and from what one rank left at stage 0."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    from cluster.pool.engine import join_group
    from cluster.storage.training_state import read_state, write_state

    join_group(rank, 2, "127.0.0.1", port, "gloo", 60.0)
    for stage in (0, 1, 2):
        with pooled(stage, AHEAD, share=BATCH // 2) as engine:
            train(engine, range(HALF), rank, 2)
            write_state(folder / f"two-{stage}-half", engine, {}, HALF)
            train(engine, range(HALF, STEPS), rank, 2)
            write_state(folder / f"two-{stage}", engine, {}, STEPS)
            if stage:
                (layout,) = engine._inner.layouts.values()
                assert layout.shared and layout.mine, "a matrix that both have, and matrices that one has"
    state = read_state(folder / "one-0-half")
    for stage in (1, 2):
        with pooled(stage, AHEAD, state, share=BATCH // 2) as engine:
            train(engine, range(HALF, STEPS), rank, 2)
            write_state(folder / f"one-0-two-{stage}", engine, {}, STEPS)
    torch.distributed.destroy_process_group()


def test_two_ranks_are_one_process_and_states_go_both_ways(group: None, tmp_path: Path) -> None:
    from cluster.storage.training_state import read_state, write_state

    with pooled(0, AHEAD) as engine:
        train(engine, range(HALF))
        write_state(tmp_path / "one-0-half", engine, {}, HALF)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = int(probe.getsockname()[1])
    torch.multiprocessing.spawn(one_of_two, (port, tmp_path), nprocs=2)
    expected = local(AHEAD, range(STEPS)).tensors
    for name in ("two-0", "two-1", "two-2", "one-0-two-1", "one-0-two-2"):
        state = read_state(tmp_path / name)
        assert state is not None and state.counters == {"step": STEPS}, name
        assert_same({key: tensor for key in state.places if (tensor := state.get(key)) is not None}, expected, 1e-5)
    for stage in (0, 1):
        with pooled(stage, AHEAD, read_state(tmp_path / "two-2-half")) as engine:
            train(engine, range(HALF, STEPS))
            assert_same(dict(engine.state()), expected, 1e-5)
