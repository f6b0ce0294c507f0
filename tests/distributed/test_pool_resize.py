"""Training that outlives its pool: a round goes on after a kill, in a pool of the same size or of another one."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch

from cluster.pool.group import PoolError, WorkerGroup
from cluster.pool.worker import TRAINER
from cluster.storage.releases import Release, Releases, shards_fingerprint
from cluster.storage.training_state import MARKER
from nl_model.config import OptimizerConfig
from nl_model.weights import load_tensors, split
from pipelines.sleep.plan import RoundPlan
from tests.pool import Bench, own_cluster, prepare, wait_for

pytestmark = pytest.mark.timeout(600)
STEPS, EVERY = 24, 4
Tensors = Dict[str, torch.Tensor]


@dataclass(frozen=True)
class Made:
    """A candidate, and how it came about."""

    directory: Path
    resumed_at: int
    loss: float
    flops: float
    fingerprint: str
    ranks: List[Any]

    @property
    def weights(self) -> Tensors:
        found: Tensors = {}
        for rank in self.ranks:
            found.update(load_tensors(self.directory / rank.shard.file)[0])
        return split(found, "weight")


class Pool:
    """A started pool, and states that are put before it."""

    def __init__(self, bench: Bench, group: WorkerGroup, name: str) -> None:
        self.bench, self.group, self.name = bench, group, name
        self.states = bench.run_dir / "checkpoints" / "pool"

    def run(self, plan: RoundPlan, label: str, state: Path | None = None, anchor: str = "") -> Made:
        """A round to its end, from a state if one is given."""
        self._put(state)
        directory = self._directory(label)
        found = self.group.call("run_round", plan, anchor or self.bench.anchor, str(directory), [])
        loss = sum(rank.loss.get("total", 0.0) for rank in found) / len(found)
        fingerprint = shards_fingerprint([rank.shard for rank in found])
        assert not self.states.exists(), "a finished round needs no states any more"
        return Made(directory, found[0].resumed_at, loss, sum(rank.flops for rank in found), fingerprint, list(found))

    def die(self, plan: RoundPlan, state: Path | None, keep: Path) -> Path:
        """A round whose pool is killed when it has left a state further on; returns a copy of that state."""
        self._put(state)
        before = self._newest()
        calls = self.group.async_call("run_round", plan, self.bench.anchor, str(self._directory("killed")), [])
        wait_for(lambda: self._newest() > before, 60)
        self.group.kill()
        with pytest.raises(PoolError):
            self.group.collect(calls)
        time.sleep(0.2)
        newest = self.states / f"step-{self._newest():08d}"
        assert before < self._newest() < plan.steps
        return Path(shutil.copytree(newest, keep))

    def _put(self, state: Path | None) -> None:
        shutil.rmtree(self.states, ignore_errors=True)
        if state is not None:
            step = json.loads((state / MARKER).read_text())["step"]
            shutil.copytree(state, self.states / f"step-{step:08d}")

    def _newest(self) -> int:
        return max((int(p.parent.name[5:]) for p in self.states.glob(f"step-*/{MARKER}")), default=0)

    def _directory(self, label: str) -> Path:
        return Releases(self.bench.run_dir / f"made-{self.name}-{label}").prepare(1)


@contextmanager
def pool(bench: Bench, ranks: int, stage: int) -> Iterator[Pool]:
    """A pool of so many ranks at a ZeRO stage."""
    extra = (f"pool.checkpoint_every={EVERY}", "sleep.teacher=0.1", "sleep.anchor=0.1", "dreams.share=0.0625")
    cfg = bench.config(f"pool.ranks={ranks}", f"pool.zero_stage={stage}", *extra)
    assert cfg.sleep.carry == "trainer" and cfg.sleep.average, "a state has weights, their average and moments"
    group = WorkerGroup(cfg, str(bench.run_dir), bench.state)
    group.start()
    try:
        yield Pool(bench, group, f"{ranks}-{stage}")
    finally:
        group.kill()


def at_its_end(state: Path, to: Path) -> RoundPlan:
    """A copy of a state as if its round ended there; the plan of that round."""
    shutil.copytree(state, to)
    marker = json.loads((to / MARKER).read_text())
    marker["key"]["steps"] = marker["step"]
    (to / MARKER).write_text(json.dumps(marker))
    return RoundPlan(**marker["key"])


def stored(directory: Path) -> Tensors:
    found: Tensors = {}
    for file in directory.glob("*.safetensors"):
        found.update(load_tensors(file)[0])
    assert found
    return found


def moments(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(("weight/", "average/"))}


def below(prefix: str, tensors: Tensors) -> Tensors:
    return {n.removeprefix(f"{prefix}/"): t for n, t in tensors.items() if n.startswith(f"{prefix}/")}


def weights(tensors: Tensors) -> Tensors:
    return below("weight", tensors)


def distance(found: Tensors, expected: Tensors) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dict[str, Any]]:
    """2 ranks at stage 1, 1 rank at stage 3, 2 ranks at stage 1 again; and the round that nothing happened to."""
    root = tmp_path_factory.mktemp("resize")
    found: Dict[str, Any] = {}
    with own_cluster():
        bench = prepare(root / "run")
        plan = replace(bench.plan, steps=STEPS)
        with pool(bench, 2, 1) as two:
            found["undisturbed"] = two.run(plan, "undisturbed")
            found["two"] = two.die(plan, None, root / "two")
        with pool(bench, 1, 3) as one:
            found["two, loaded by one"] = one.run(at_its_end(found["two"], root / "end"), "end", root / "end")
            found["two, ended by one"] = one.run(plan, "resumed", found["two"])
            found["one"] = one.die(plan, found["two"], root / "one")
        with pool(bench, 2, 1) as two:
            found["two, ended by two"] = two.run(plan, "same", found["two"])
            found["one, loaded by two"] = two.run(at_its_end(found["one"], root / "back"), "end", root / "back")
            found["one, ended by two"] = two.run(plan, "back", found["one"])
            made = found["undisturbed"]
            shards = [rank.shard for rank in made.ranks]
            Releases(made.directory.parent).publish(Release(1, 0, 1, 0, -1, 0, made.fingerprint, shards))
            after = replace(plan, round=2, steps=1, lr_scale=1e-12, trained_steps=STEPS)
            found["next"] = two.run(after, "next", None, str(made.directory))
        yield found


def test_a_round_goes_on_after_a_kill_and_gives_the_same_candidate(history: Dict[str, Any]) -> None:
    whole, repeated = history["undisturbed"], history["two, ended by two"]
    assert whole.resumed_at == 0 and repeated.resumed_at >= EVERY
    assert repeated.fingerprint == whole.fingerprint
    assert repeated.loss == whole.loss and repeated.flops == whole.flops
    assert distance(stored(repeated.directory / TRAINER), stored(whole.directory / TRAINER)) == 0


@pytest.mark.parametrize(("before", "loaded"), [("two", "two, loaded by one"), ("one", "one, loaded by two")])
def test_a_resized_pool_loads_every_bit(history: Dict[str, Any], before: str, loaded: str) -> None:
    """2 ranks at stage 1 to 1 rank at stage 3, and back: a round that ends where it goes on hands on what it loaded."""
    state, made = stored(history[before]), history[loaded]
    assert len(made.ranks) != len(list(history[before].glob("*.safetensors")))
    assert distance(made.weights, below("average", state)) == 0, "it releases the average"
    assert len(moments(state)) == 2 * len(weights(state)), "Adam's two"
    handed = stored(made.directory / TRAINER)
    assert distance(weights(handed), weights(state)) == 0 and distance(moments(handed), moments(state)) == 0


@pytest.mark.parametrize("resized", ["two, ended by one", "one, ended by two"])
def test_a_resized_round_ends_like_the_others(history: Dict[str, Any], resized: str) -> None:
    whole, made = history["undisturbed"], history[resized]
    assert made.resumed_at >= EVERY
    assert made.loss == pytest.approx(whole.loss, abs=1e-4)
    assert made.flops == pytest.approx(whole.flops)
    assert distance(made.weights, whole.weights) < 1e-3


def test_weights_and_moments_pass_on_to_the_round_after(history: Dict[str, Any]) -> None:
    """A round of one step that is too small to move anything goes on with the trainer's weights, not the release's."""
    made, after = history["undisturbed"], history["next"]
    assert {rank.trainer for rank in made.ranks} == {"cold"} and {rank.trainer for rank in after.ranks} == {"continued"}
    left, found = stored(made.directory / TRAINER), stored(after.directory / TRAINER)
    assert distance(weights(found), weights(left)) < 1e-9
    assert distance(made.weights, weights(left)) > 1e-4
    squares = {name: tensor for name, tensor in moments(left).items() if name.startswith("exp_avg_sq/")}
    assert len(squares) == len(weights(left)) and moments(found).keys() == moments(left).keys()
    beta2 = OptimizerConfig().beta2
    for name, tensor in squares.items():  # one step takes this much off at most
        assert bool((found[name] >= beta2 * tensor * (1 - 1e-5)).all()) and bool(tensor.any()), name
    counters = [json.loads((one.directory / TRAINER / MARKER).read_text())["counters"] for one in (made, after)]
    assert [one["step"] for one in counters] == [STEPS, STEPS + 1]
