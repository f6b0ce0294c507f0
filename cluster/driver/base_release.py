"""Release 0: a checkpoint somebody names, a cached base, or a base pretrained now."""

from __future__ import annotations

import fcntl
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

from torch import Tensor

from cluster.driver.checkpoint import check_tensors
from cluster.pool.group import WorkerGroup
from cluster.pool.rounds import RoundRunner
from cluster.storage.releases import Release, Releases, layout, load_release, shards_fingerprint, write_shard
from nl_model.model import NestedLM
from nl_model.weights import join, load_into, split, sync
from pipelines.config.schema import Config
from pipelines.data.module import DataModule
from pipelines.data.stream import Sequence
from pipelines.sleep.base import base_hash, base_sequences
from pipelines.wake.writes import learner_writes, no_offset

CACHE = ".bases"
LOCK = "lock"


def prepare_base(
    cfg: Config, run_dir: Path, setting: DataModule, runner: RoundRunner, emit: Callable[..., Any]
) -> Tuple[List[Sequence], float]:
    """Make sure the run has a release 0; returns the base mixture (to be stored as experience) and the FLOPs spent.

    A checkpoint is not trained on the mixture, but has learned such text before: stored, it can be replayed.
    """
    releases = runner.releases
    sequences = base_sequences(setting.corpus, setting.tokenizer, cfg, setting.base_sources)
    if 0 in releases.numbers():
        return sequences, 0.0
    if cfg.base.checkpoint is not None:
        _from_checkpoint(cfg, setting, releases)
        emit("base_finished", origin="checkpoint", tokens=0, seconds=0.0)
        return sequences, 0.0
    start = time.perf_counter()
    cache = Releases(run_dir.parent / CACHE / base_hash(cfg, setting.base_sources, sequences))
    origin, flops = "cached", 0.0
    with _alone(cache.path):  # runs that start side by side share a base: one makes it, the others wait
        if 0 not in cache.numbers():
            emit("base_started", tokens=cfg.base.tokens, sources=setting.base_sources)
            origin, flops = "pretrained", _pretrain(runner, cache)
    _take(cfg, setting, cache, releases)
    seconds = time.perf_counter() - start
    emit("base_finished", origin=origin, tokens=cfg.base.tokens, seconds=seconds)
    return sequences, flops


def _pretrain(runner: RoundRunner, cache: Releases) -> float:
    """Pretrain a base into the cache; returns the FLOPs spent."""

    def pretrain(group: WorkerGroup) -> List[Any]:
        calls = group.async_call("pretrain", str(cache.prepare(0)))
        return group.collect(calls)

    ranks = runner.with_pool(pretrain)
    runner.publish_base(cache.directory(0), ranks)
    return float(sum(rank.flops for rank in ranks))


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold a folder against other processes; a holder that dies lets go."""
    with (directory / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _take(cfg: Config, setting: DataModule, cache: Releases, releases: Releases) -> None:
    """Make a cached base release 0. What has an offset depends on what the learner writes, so a base that a run of
    another strategy has made is taken apart and put together anew; otherwise its files are copied."""
    source = cache.directory(0)
    model = NestedLM(cfg.model, cfg.levels, setting.tokenizer.vocab_size)
    held = {name for shard in cache.read(0).shards for name in shard.tensors if name.startswith("offset/")}
    if held == {f"offset/{name}" for name in learner_writes(model, cfg)}:
        _copy(source, releases)
    else:
        _publish(cfg, setting, releases, split(load_release(source), "weight"), str(source))


def _copy(source: Path, releases: Releases) -> None:
    """Copy a release, as its cache outlives a run. The marker goes last, once what it vouches for is durable."""
    release, directory = Releases(source.parent).read(0), releases.prepare(0)
    for shard in release.shards:
        shutil.copyfile(source / shard.file, directory / shard.file)
        sync(directory / shard.file)
    sync(directory)
    releases.publish(release)


def _from_checkpoint(cfg: Config, setting: DataModule, releases: Releases) -> None:
    """Turn a release of another run into release 0 of this one; levels it lacks start neutral."""
    assert cfg.base.checkpoint is not None
    check_tensors(cfg, setting.tokenizer.vocab_size, layout(Path(cfg.base.checkpoint)))
    weights = split(load_release(Path(cfg.base.checkpoint)), "weight")
    model = NestedLM(cfg.model, cfg.levels, setting.tokenizer.vocab_size).reset_parameters(cfg.run.seed)
    load_into(model, weights)
    whole = {name: p.detach() for name, p in model.named_parameters()}
    _publish(cfg, setting, releases, whole, cfg.base.checkpoint)


def _publish(cfg: Config, setting: DataModule, releases: Releases, weights: Dict[str, Tensor], origin: str) -> None:
    """Make weights release 0, with an offset of zero for all that the learner writes."""
    model = NestedLM(cfg.model, cfg.levels, setting.tokenizer.vocab_size)
    tensors = join(weight=weights, offset=no_offset(model, cfg, weights))
    shard = write_shard(releases.prepare(0), 0, 1, tensors)
    releases.publish(Release(0, None, 0, 0, -1, 0, shards_fingerprint([shard]), [shard], {"from": origin}))
