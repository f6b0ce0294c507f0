"""One core: a run with real processes and a run in simulated time are the same training, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import torch
from torch import Tensor

from cluster.storage.releases import Releases, load_release
from nl_model.weights import split
from pipelines.config.load import load_config
from pipelines.config.schema import Config
from pipelines.data.module import open_data
from pipelines.machine.local import LocalParts
from pipelines.machine.records import RoundRecord
from pipelines.machine.simulated import Simulation
from pipelines.machine.state import RunState
from pipelines.wake.writes import with_budget
from tests.harness import Run

pytestmark = pytest.mark.timeout(600)
FIXED = ("run.deterministic=true", "control.enabled=false", "report.look_every=4096", "stream.max_source_bytes=12288")
ALONE = ("pool.ranks=1", "pool.zero_stage=0")
SAME = ("id", "tokens", "anchor", "release", "steps", "decision", "reason", "recent_scale", "lr_scale", "trainer")
"""What two records of the same round agree on to the letter. Store versions count openings, seconds are a machine's."""


def simulate(cfg: Config, base: Dict[str, Tensor] | None = None) -> Tuple[RunState, LocalParts, List[Dict[str, Any]]]:
    """A run of a configuration in simulated time: state, parts, looks."""
    torch.use_deterministic_algorithms(cfg.run.deterministic, warn_only=True)
    data = open_data(cfg)
    cfg = with_budget(cfg, data.tokenizer.vocab_size)
    parts, looks = LocalParts(cfg, data, base), []

    def note(kind: str, fields: Dict[str, Any]) -> None:
        if kind == "look":
            looks.append(fields)

    end = Simulation(parts.rules, parts, note=note)
    print(end.attempt())
    return end.saved, parts, looks


def released(run: Run) -> Dict[int, Dict[str, Tensor]]:
    releases = Releases(run.directory / "releases")
    return {number: split(load_release(releases.directory(number)), "weight") for number in releases.numbers()}


def records(run: Run) -> List[RoundRecord]:
    return [RoundRecord.from_json(record) for record in run.summary()["rounds"]]


def told(record: RoundRecord) -> Dict[str, Any]:
    return {key: getattr(record, key) for key in SAME}


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("circadian", ()),
        ("guided", ("sleep.carry=nothing", "sleep.schedule=cosine", "sleep.average=0", "sleep.teacher=0.1")),
        ("replay", ("strategy=replay", "sleep.average=20")),
    ],
)
def test_one_core_to_the_bit(name: str, overrides: Tuple[str, ...], runs: Path) -> None:
    run = Run(runs, f"one-core-{name}", (*FIXED, *ALONE, *overrides))
    assert run.finish() == 0, run.tail()
    cfg = load_config("smoke", (*FIXED, *ALONE, *overrides))
    torch.set_num_threads(cfg.compute.threads)
    state, parts, looks = simulate(cfg)

    real = released(run)
    assert real.keys() == parts.releases.keys() and len(real) >= 3
    for number, weights in real.items():
        mine = parts.releases[number].weights
        assert weights.keys() == mine.keys()
        assert [n for n, tensor in weights.items() if not torch.equal(tensor, mine[n])] == [], f"release {number}"
    theirs = records(run)
    assert [told(record) for record in theirs] == [told(record) for record in state.rounds]
    assert [record.row for record in theirs] == [record.row for record in state.rounds]
    assert [record.loss for record in theirs] == [record.loss for record in state.rounds]
    matrix = [[row["bpb"][source] for source in parts.data.sources] for row in state.rows]
    assert run.summary()["matrix"] == matrix
    seen = [{key: event[key] for key in ("tokens", "release", "served", "rested")} for event in run.events("look")]
    assert seen == looks and len(looks) >= 3


def test_one_core_on_two_ranks(runs: Path) -> None:
    """ZeRO sums in another order: the same but for rounding. Both start from the base that the ranks made."""
    overrides = (*FIXED, "pool.ranks=2", "pool.zero_stage=2")
    run = Run(runs, "one-core-ranks", overrides)
    assert run.finish() == 0, run.tail()
    real = released(run)
    cfg = load_config("smoke", overrides)
    torch.set_num_threads(cfg.compute.threads)
    state, parts, _ = simulate(cfg, real[0])
    assert [told(record)["decision"] for record in records(run)] == [record.decision for record in state.rounds]
    assert real.keys() == parts.releases.keys() and len(real) >= 3
    for number, weights in real.items():
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, parts.releases[number].weights[name], rtol=1e-5, atol=1e-5)
