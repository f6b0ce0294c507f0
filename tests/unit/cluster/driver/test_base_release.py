"""Release 0 from a checkpoint: what is replayed beside it, and which checkpoints are refused, with what remedy."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import pytest
import torch

from cluster.driver.base_release import prepare_base
from cluster.driver.checkpoint import check_checkpoint, check_tensors
from cluster.pool.rounds import RoundRunner
from cluster.storage.export import keep_tokenizer
from cluster.storage.releases import Release, Releases, layout, load_release, shards_fingerprint, write_shard
from nl_model.model import NestedLM
from nl_model.weights import split
from pipelines.config.schema import BaseConfig, Config, TokenizerConfig
from pipelines.data.module import open_data
from pipelines.data.stream import Sequence
from pipelines.data.tokens import BPETokenizer, ByteTokenizer
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


@pytest.mark.parametrize("sources", [["a"], []])
def test_controls_of_a_run_from_a_checkpoint_replay_what_it_does(
    make_config: MakeConfig, model: NestedLM, sources: List[str]
) -> None:
    cfg = make_config(base=BaseConfig(checkpoint="elsewhere", sources=sources))
    base = {name: p.detach() for name, p in model.named_parameters()}
    parts = LocalParts(cfg, replace(open_data(cfg), cfg=cfg), base)
    count, _ = parts.prepare_base()
    parts.store_base()
    assert (count > 0) == bool(sources) and len(parts.store.at()) == count


# What a run cannot start from, said before anything is written.


def refused(cfg: Config, run_dir: Path) -> str:
    with pytest.raises(ValueError, match=r"^base\.checkpoint='") as error:
        check_checkpoint(cfg, run_dir, open_data(cfg).tokenizer)
    return str(error.value)


def named(make_config: MakeConfig, path: Path, **sections: Any) -> Config:
    return make_config(base=BaseConfig(checkpoint=str(path), sources=["a"]), **sections)


def test_a_whole_release_of_this_model_is_taken(tmp_path: Path, make_config: MakeConfig, checkpoint: Path) -> None:
    check_checkpoint(named(make_config, checkpoint), tmp_path / "run", ByteTokenizer())
    check_checkpoint(make_config(), tmp_path / "run", ByteTokenizer())


def test_what_is_no_release_is_named_with_what_it_is(tmp_path: Path, make_config: MakeConfig, checkpoint: Path) -> None:
    run, plain, hf = checkpoint.parent.parent, tmp_path / "plain", tmp_path / "hf"
    (run / "config.yaml").write_text("")
    for folder in (plain, hf):
        folder.mkdir()
    (hf / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    for path, said in {
        tmp_path / "absent": "does not exist; give a release directory, runs/NAME/releases/NUMBER",
        tmp_path / "file": "is a file; give a release directory",
        run: f"is a run, not one of its releases; its newest release is {checkpoint}",
        hf: "is a model for transformers, which a run cannot start from",
        plain: "is no published release: it has no STABLE marker; give a release directory",
    }.items():
        message = refused(named(make_config, path), tmp_path / "run")
        assert message.startswith(f"base.checkpoint='{path}' {said}")


@pytest.mark.parametrize("damage", ["shard bytes", "shard gone", "index", "index keys", "header"])
def test_a_damaged_release_is_refused(tmp_path: Path, make_config: MakeConfig, checkpoint: Path, damage: str) -> None:
    (shard,) = checkpoint.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    if damage == "shard bytes":
        content[-3] ^= 1
        shard.write_bytes(content)
    elif damage == "header":
        shard.write_bytes(b"\xff" * 20)
    elif damage == "shard gone":
        shard.unlink()
    else:
        (checkpoint / "release.json").write_text('{"number": 1, "shards": []}' if damage == "index keys" else "{")
    message = refused(named(make_config, checkpoint), tmp_path / "run")
    assert "restore it from a copy" in message


def test_another_model_is_refused_with_the_shape_and_where_to_find_its_own(
    tmp_path: Path, make_config: MakeConfig, make_levels: Callable[..., Any], checkpoint: Path
) -> None:
    wider = {**make_levels(), "slow": replace(make_levels()["slow"], width=9)}
    message = refused(named(make_config, checkpoint, levels=wider), tmp_path / "run")
    assert "has shape (8, 7), this model wants (8, 9); use the model.* and levels.* it was made with" in message
    (checkpoint.parent.parent / "config.yaml").write_text("")
    deeper = replace(make_config().model, blocks=3)
    message = refused(named(make_config, checkpoint, model=deeper), tmp_path / "run")
    assert "holds 'blocks.1.levels.fast" in message and str(checkpoint.parent.parent / "config.yaml") in message
    tensors = {key: facts for key, facts in layout(checkpoint).items() if ".slow." not in key}
    with pytest.raises(
        ValueError, match=r"lacks 'blocks\.0\.levels\.slow.* and \d more parameters of the pool's levels"
    ):
        check_tensors(named(make_config, checkpoint), 257, tensors)
    tensors = {key: facts for key, facts in layout(checkpoint).items() if ".fast." not in key}
    check_tensors(named(make_config, checkpoint), 257, tensors)


def test_another_tokenizer_is_refused(tmp_path: Path, make_config: MakeConfig, checkpoint: Path) -> None:
    trained = TokenizerConfig(kind="bpe", vocab_size=300)
    message = refused(named(make_config, checkpoint, tokenizer=trained), tmp_path / "run")
    assert "its vocabulary has 257 tokens, this one" in message and "tokenizer.*" in message
    # As many tokens, but others: only the run beside the release knows.
    keep_tokenizer(checkpoint.parent.parent, BPETokenizer.train(["other words"], 257))
    message = refused(named(make_config, checkpoint), tmp_path / "run")
    assert "was made with another tokenizer (bpe instead of byte)" in message


def test_a_run_that_has_its_base_needs_no_checkpoint_any_more(
    tmp_path: Path, make_config: MakeConfig, checkpoint: Path
) -> None:
    cfg = named(make_config, checkpoint)
    prepare(cfg, tmp_path / "run")
    shutil.rmtree(checkpoint)
    check_checkpoint(cfg, tmp_path / "run", ByteTokenizer())
    assert "does not exist" in refused(cfg, tmp_path / "other")
