"""What trains asleep, through DeepSpeed: all levels, the receivers' own weights, or slots that are then folded."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Set

import pytest
import torch
from torch import Tensor

from cluster.storage.releases import Release, Releases, shards_fingerprint, write_shard
from nl_model.model import NestedLM
from nl_model.weights import join, load_tensors, parameters_of, save_tensors
from pipelines.config.load import load_config
from pipelines.data.module import open_data
from pipelines.data.stream import Sequence as StreamSequence
from pipelines.experience import ExperienceStore, Record
from pipelines.sleep.plan import RoundPlan
from pipelines.wake.writes import no_offset

RANK, STEPS, ROWS = 3, 6, 64
MERGED = 0.25
CASES = [("all", 2, 0.0), ("dense", 2, 0.0), ("slots", 2, 0.0), ("slots", 3, 0.0), ("all", 1, MERGED)]
"""Modes, ZeRO stages, and sleep.merge."""
COLD = ("strategy=cold_rounds", "sleep.teacher=0.1", "sleep.anchor=0.1")
"""What every mode can do: a round of its own, which releases the weights that it trained last; with both guides."""


@dataclass(frozen=True)
class Made:
    """A candidate, and what making it cost."""

    tensors: Dict[str, Tensor]
    loss: Dict[str, float]
    flops: float


def as_record(row: StreamSequence) -> Record:
    return Record(
        key=row.key,
        source=row.source,
        document=row.document,
        offset=row.offset,
        subject=row.subject,
        kind="real",
        surprise=5.0,
        fast_step=0,
        release=0,
        tokens=row.tokens,
    )


def prepare(run_dir: Path) -> RoundPlan:
    """A run directory that is ready for round 1, with weights that are zero nowhere."""
    cfg = load_config("smoke")
    setting = open_data(cfg)
    with ExperienceStore.open(run_dir / "store", cfg.model.context, setting.tokenizer.dtype, cfg.store) as store:
        store.append([as_record(row) for row in setting.stream().next_batch(ROWS)])
        snapshot = store.commit()
    model, generator = NestedLM(cfg.model, cfg.levels, setting.tokenizer.vocab_size), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    fast = parameters_of(model, "learner")
    weights = {name: p.detach() for name, p in model.named_parameters()}
    tensors = join(weight=weights, offset=no_offset(model, cfg, weights))
    releases = Releases(run_dir / "releases")
    shard = write_shard(releases.prepare(0), 0, 1, tensors)
    releases.publish(Release(0, None, 0, 0, -1, 0, shards_fingerprint([shard]), [shard]))
    save_tensors(run_dir / "fast.safetensors", fast)
    return RoundPlan(1, snapshot, 0, ROWS - 1, "fast.safetensors", 0, ROWS * cfg.model.context, STEPS, 7)


def work(run_dir: str, plan: RoundPlan, answers: Any) -> None:
    """One rank, all cases."""
    from cluster.pool.worker import ConsolidationWorker

    state = open_data(load_config("smoke")).tokenizer.state()
    for number, (mode, stage, merge) in enumerate(CASES):
        keys = [f"sleep.mode={mode}", f"sleep.slot_rank={RANK}", f"pool.zero_stage={stage}", "pool.ranks=1"]
        keys += [f"sleep.merge={merge}", *COLD]
        worker = ConsolidationWorker(load_config("smoke", keys), run_dir, state)
        if number == 0:
            worker.join(0, 1, "127.0.0.1", worker.free_port())
        worker.rank, worker.world = 0, 1
        directory = Releases(Path(run_dir) / f"made-{mode}-{stage}").prepare(1)
        result = worker.run_round(plan, f"{run_dir}/releases/000000", str(directory), worker.setting.sources[:1])
        answers.put((mode, stage, str(directory / result.shard.file), result.loss, result.flops))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("modes")


@pytest.fixture(scope="module")
def made(start: Path) -> Dict[str, Made]:
    """Candidates of the same plan by mode and stage."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=work, args=(str(start), prepare(start), answers))
    process.start()
    found: List[Any] = [answers.get(timeout=200) for _ in CASES]
    process.join(30)
    return {
        f"{mode}-{stage}": Made(load_tensors(Path(file))[0], loss, flops) for mode, stage, file, loss, flops in found
    }


def moved(start: Path, made: Made) -> Set[str]:
    """Names of the weights that a candidate changed."""
    file = next((start / "releases" / "000000").glob("*.safetensors"))
    before = load_tensors(file)[0]
    assert set(before) == set(made.tensors), "releases look the same in every mode"
    return {
        n.removeprefix("weight/") for n, t in made.tensors.items() if "weight/" in n and not torch.equal(t, before[n])
    }


def test_each_mode_writes_what_it_says(start: Path, made: Dict[str, Made]) -> None:
    """Check 23 through ZeRO: everything else is bit-identical."""
    model = NestedLM(load_config("smoke").model, load_config("smoke").levels, 257)
    assert moved(start, made["all-2"]) == {name for name, _ in model.named_parameters()}
    assert moved(start, made["dense-2"]) == set(model.parameters_of("slow"))
    mlps = {name for name in model.parameters_of("slow") if ".levels.slow." in name}
    for case in ("slots-2", "slots-3"):
        assert moved(start, made[case]) == mlps
        still = [t for name, t in made[case].tensors.items() if name.startswith("offset/")]
        assert still and not any(bool(t.any()) for t in still), "fast levels come back as they were"


def test_slots_arrive_as_low_rank_updates(start: Path, made: Dict[str, Made]) -> None:
    before = load_tensors(next((start / "releases" / "000000").glob("*.safetensors")))[0]
    for case in ("slots-2", "slots-3"):
        for name in moved(start, made[case]):
            change = made[case].tensors[f"weight/{name}"].double() - before[f"weight/{name}"].double()
            values = torch.linalg.svdvals(change)
            assert values[RANK - 1] > 1e-4 and values[RANK] < 1e-3 * values[0]
        assert abs(made[case].loss["fold"]) < 1e-6
    for name, tensor in made["slots-2"].tensors.items():
        torch.testing.assert_close(made["slots-3"].tensors[name], tensor, rtol=0, atol=1e-4)


def test_a_merged_candidate_lies_on_the_way_back_to_the_anchor(start: Path, made: Dict[str, Made]) -> None:
    before = load_tensors(next((start / "releases" / "000000").glob("*.safetensors")))[0]
    for name, tensor in made["all-2"].tensors.items():
        if name.startswith("weight/"):
            expected = torch.lerp(tensor, before[name], MERGED)
            torch.testing.assert_close(made["all-1"].tensors[name], expected, rtol=0, atol=1e-4)


def test_less_trained_is_less_computed(made: Dict[str, Made]) -> None:
    flops = [made[case].flops for case in ("all-2", "dense-2", "slots-2")]
    assert flops[0] > flops[1] > flops[2] == made["slots-3"].flops
