"""The consolidation pool with real ranks: sharding over gloo, agreement of the ZeRO stages, death of a rank."""

from __future__ import annotations

import functools
import math
import os
import signal
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Callable, Dict, Iterator, List

import psutil
import pytest
import torch

from cluster.actors.start import results
from cluster.pool.group import PoolError, WorkerGroup
from cluster.pool.rounds import Outcome, RoundRunner
from cluster.storage.releases import Releases, shards_fingerprint
from nl_model.weights import load_tensors
from tests.harness import same_process
from tests.pool import Bench, own_cluster, prepare, wait_for

GUIDED = ("sleep.teacher=0.1", "sleep.anchor=0.1", "dreams.share=0.0625")
"""Everything that a round can learn from, so that stages have to agree about all of it."""


@dataclass(frozen=True)
class Trained:
    """What a pool made of the plan."""

    backend: str
    world: int
    loss: float
    optimizer_bytes: List[int]
    fingerprint: str
    tensors: Dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with own_cluster():
        yield


@pytest.fixture(scope="module")
def bench(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return prepare(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def train(bench: Bench) -> Callable[[int, int], Trained]:
    """Runs the plan on a pool of so many ranks at a ZeRO stage; each only once."""

    @functools.cache
    def run(ranks: int, stage: int) -> Trained:
        cfg = bench.config(f"pool.ranks={ranks}", f"pool.zero_stage={stage}", *GUIDED)
        directory = Releases(bench.run_dir / f"made-{ranks}-{stage}").prepare(1)
        group = WorkerGroup(cfg, str(bench.run_dir), bench.state)
        group.start()
        try:
            anchor = str(bench.run_dir / "releases" / "000000")
            found = group.call("run_round", bench.plan, anchor, str(directory), bench.setting.sources)
        finally:
            backend = group.backend
            group.kill()
        tensors: Dict[str, torch.Tensor] = {}
        for rank in found:
            tensors.update(load_tensors(directory / rank.shard.file)[0])
        return Trained(
            backend,
            len(found),
            sum(rank.loss["total"] for rank in found) / len(found),
            [rank.optimizer_bytes for rank in found],
            shards_fingerprint([rank.shard for rank in found]),
            tensors,
        )

    return run


def test_the_switch_that_spares_a_compiler_is_still_there() -> None:
    # cluster/pool/engine.py turns this internal name off; renamed, every CPU host would silently compile at first.
    import deepspeed

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__


@pytest.mark.parametrize("stage", [2, 3])
def test_stages_agree(train: Callable[[int, int], Trained], stage: int) -> None:
    plain, sharded = train(2, 0), train(2, stage)
    assert (sharded.backend, sharded.world) == ("gloo", 2)
    assert math.isfinite(sharded.loss) and sharded.loss < math.log(257)
    assert sharded.loss == pytest.approx(plain.loss, abs=1e-4)
    assert set(sharded.tensors) == set(plain.tensors)
    for name, tensor in plain.tensors.items():
        torch.testing.assert_close(sharded.tensors[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_each_of_two_ranks_holds_half_of_the_optimizer(train: Callable[[int, int], Trained], stage: int) -> None:
    whole = train(2, 0).optimizer_bytes  # nothing is sharded at stage 0
    assert whole[0] == whole[1] > 0
    for share in train(2, stage).optimizer_bytes:
        assert share / whole[0] == pytest.approx(0.5, abs=0.1)


def test_two_ranks_learn_what_one_learns(train: Callable[[int, int], Trained]) -> None:
    assert train(2, 2).loss == pytest.approx(train(1, 2).loss, abs=1e-3)


def test_a_round_is_repeated_after_a_kill_and_gives_the_same_candidate(
    bench: Bench, train: Callable[[int, int], Trained]
) -> None:
    runner = RoundRunner(bench.config(*GUIDED), bench.run_dir, bench.state)

    def attempt() -> Future[Outcome]:
        return runner.submit(lambda: runner.run_round(bench.plan, bench.setting.sources, bench.anchor_row))

    try:
        future = attempt()
        pids = wait_for(lambda: runner.group.backend and list(runner.group.pids), 120)
        wait_for(lambda: results(runner.group.async_call("progress"), 60)[0][0] > 0, 60)
        first, start = [psutil.Process(pid) for pid in pids], time.monotonic()
        assert len(set(pids)) == 2
        os.kill(pids[0], signal.SIGKILL)
        with pytest.raises(PoolError):
            future.result(timeout=60)
        assert time.monotonic() - start < 30 and not runner.group.started
        wait_for(lambda: not any(same_process(rank) for rank in first), 30)
        outcome = attempt().result(timeout=240)
        assert shards_fingerprint([rank.shard for rank in outcome.ranks]) == train(2, 2).fingerprint
        assert outcome.decision.promoted
        runner.publish(outcome, replace(outcome.record(), release=1), {})
        assert runner.releases.numbers() == [0, 1]
    finally:
        runner.stop()
