"""Release 0 from a checkpoint: what is replayed beside it, and which checkpoints are refused, with what remedy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import pytest
import torch

from cluster.driver.base_release import prepare_base
from cluster.pool.rounds import RoundRunner
from cluster.storage.releases import Release, Releases, load_release, shards_fingerprint, split, write_shard
from nl_model.model import NestedLM
from pipelines.config.schema import BaseConfig, Config
from pipelines.data.module import open_data
from pipelines.data.stream import Sequence
from pipelines.experience import ExperienceStore, Snapshot
from pipelines.experience.replay import Replay
from pipelines.machine.local import LocalParts
from pipelines.sleep.base import base_records, base_sequences

MakeConfig = Callable[..., Config]
MakeModel = Callable[..., NestedLM]


def publish(folder: Path, model: NestedLM) -> Path:
    """A release as another run would have left it; returns its directory."""
    releases = Releases(folder)
    shard = write_shard(releases.prepare(4), 0, 1, {f"weight/{n}": p.detach() for n, p in model.named_parameters()})
    releases.publish(Release(4, 3, 4, 9, 99, 1600, shards_fingerprint([shard]), [shard]))
    return releases.directory(4)


@pytest.fixture
def model(make_config: MakeConfig, make_model: MakeModel) -> NestedLM:
    return make_model(make_config().levels)


@pytest.fixture
def checkpoint(tmp_path: Path, model: NestedLM) -> Path:
    return publish(tmp_path / "earlier" / "releases", model)


def prepare(cfg: Config, run_dir: Path) -> Tuple[List[Sequence], List[Tuple[str, Dict[str, Any]]]]:
    """Release 0 of a run directory; returns the base mixture, and the events told."""
    run_dir.mkdir(exist_ok=True)
    setting, events = open_data(cfg), list[Tuple[str, Dict[str, Any]]]()
    runner = RoundRunner(cfg, run_dir, setting.tokenizer.state())
    sequences, flops = prepare_base(cfg, run_dir, setting, runner, lambda kind, **told: events.append((kind, told)))
    assert flops == 0.0
    return sequences, events


def test_what_a_checkpoint_knows_is_stored_as_a_pretrained_base_is(
    tmp_path: Path, make_config: MakeConfig, model: NestedLM, checkpoint: Path
) -> None:
    cfg = make_config(base=BaseConfig(checkpoint=str(checkpoint), sources=["a"], max_source_bytes=800))
    sequences, events = prepare(cfg, tmp_path / "run")
    assert [(kind, told["origin"], told["tokens"]) for kind, told in events] == [("base_finished", "checkpoint", 0)]
    weights = split(load_release(tmp_path / "run" / "releases" / "000000"), "weight")
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters()), "nothing is pretrained"

    pretrained = make_config(base=BaseConfig(sources=["a"], max_source_bytes=800))
    setting = open_data(pretrained)
    expected = base_sequences(setting.corpus, setting.tokenizer, pretrained, setting.base_sources)
    assert [s.tokens.tobytes() for s in sequences] == [s.tokens.tobytes() for s in expected]
    assert 700 < sum(s.bytes for s in sequences) <= 800 and {s.source for s in sequences} == {"a"}

    with ExperienceStore.open(tmp_path / "run" / "store", 16, "uint16") as store:
        store.append(base_records(sequences))
        store.commit()
        assert store.base_rows == len(sequences)
    snapshot = Snapshot.open(tmp_path / "run" / "store")
    drawn = Replay(snapshot, np.arange(len(sequences)), cfg.sleep, seed=0).draw(8, 1, 2)
    assert {record.kind for record in snapshot.records(drawn)} == {"base"}, "rounds can replay it"


def test_a_run_that_goes_on_stores_the_same_again(tmp_path: Path, make_config: MakeConfig, checkpoint: Path) -> None:
    """A crash may fall between release 0 and the store; keys that are there already are ignored by it."""
    cfg = make_config(base=BaseConfig(checkpoint=str(checkpoint), sources=["a"]))
    first, _ = prepare(cfg, tmp_path / "run")
    again, events = prepare(cfg, tmp_path / "run")
    assert first and [s.tokens.tobytes() for s in again] == [s.tokens.tobytes() for s in first] and not events


def test_a_checkpoint_without_sources_brings_nothing_to_replay(
    tmp_path: Path, make_config: MakeConfig, checkpoint: Path
) -> None:
    cfg = make_config(base=BaseConfig(checkpoint=str(checkpoint)))
    sequences, events = prepare(cfg, tmp_path / "run")
    assert sequences == [] and [kind for kind, _ in events] == ["base_finished"]


@pytest.mark.parametrize("named", [["a"], []])
def test_controls_of_a_run_from_a_checkpoint_replay_what_it_does(
    make_config: MakeConfig, model: NestedLM, named: List[str]
) -> None:
    cfg = make_config(base=BaseConfig(checkpoint="elsewhere", sources=named))
    base = {name: p.detach() for name, p in model.named_parameters()}
    parts = LocalParts(cfg, replace(open_data(cfg), cfg=cfg), base)
    count, _ = parts.prepare_base()
    parts.store_base()
    assert (count > 0) == bool(named) and len(parts.store.at()) == count
