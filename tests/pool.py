"""A run directory that is ready for round 1, for tests that start real pools on it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest

from cluster.storage.releases import Release, Releases, shards_fingerprint, write_shard
from nl_model.model import NestedLM
from nl_model.weights import join, parameters_of, save_tensors
from pipelines.config.load import load_config
from pipelines.config.schema import Config
from pipelines.data.module import DataModule, open_data
from pipelines.experience import ExperienceStore, Record
from pipelines.sleep.base import base_records, base_sequences
from pipelines.sleep.plan import RoundPlan
from pipelines.wake.writes import no_offset
from tests.harness import ROOT

RECENT = 128
"""Experiences of the stream in the store."""


@dataclass(frozen=True)
class Bench:
    """A run directory, and the plan of its first round."""

    run_dir: Path
    setting: DataModule
    plan: RoundPlan
    anchor_row: Dict[str, float]

    def config(self, *overrides: str) -> Config:
        return load_config("smoke", overrides)

    @property
    def state(self) -> Dict[str, Any]:
        return self.setting.tokenizer.state()

    @property
    def anchor(self) -> str:
        """Directory of release 0."""
        return str(self.run_dir / "releases" / "000000")


def records(setting: DataModule) -> List[Record]:
    """The start of the stream as the learner would have logged it."""
    batch = setting.stream().next_batch(RECENT)
    return [
        Record(
            key=s.key,
            source=s.source,
            document=s.document,
            offset=s.offset,
            subject=s.subject,
            kind="real",
            surprise=5.0,
            fast_step=0,
            release=0,
            tokens=s.tokens,
        )
        for s in batch
    ]


@contextmanager
def own_cluster() -> Iterator[None]:
    """A Ray cluster of this process alone."""
    import ray

    from cluster.driver.run import start_ray

    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        before = dict(os.environ)
        os.environ["PYTHONPATH"] = str(ROOT)
        try:
            start_ray(load_config("smoke", ["ray.object_store_mb=80"]))
            yield
        finally:
            ray.shutdown()
            os.environ.clear()
            os.environ.update(before)


def prepare(run_dir: Path) -> Bench:
    """Fill a run directory: store, release 0, fast snapshot."""
    cfg = load_config("smoke")
    setting = open_data(cfg)
    with ExperienceStore.open(run_dir / "store", cfg.model.context, setting.tokenizer.dtype, cfg.store) as store:
        store.append(base_records(base_sequences(setting.corpus, setting.tokenizer, cfg, setting.base_sources)))
        store.append(records(setting))
        snapshot = store.commit()
    model = NestedLM(cfg.model, cfg.levels, setting.tokenizer.vocab_size).reset_parameters(0)
    fast = parameters_of(model, "learner")
    releases = Releases(run_dir / "releases")
    weights = {name: p.detach() for name, p in model.named_parameters()}
    shard = write_shard(releases.prepare(0), 0, 1, join(weight=weights, offset=no_offset(model, cfg, weights)))
    releases.publish(Release(0, None, 0, 0, -1, 0, shards_fingerprint([shard]), [shard]))
    (run_dir / "checkpoints").mkdir()
    save_tensors(run_dir / "checkpoints" / "fast.safetensors", fast)
    plan = RoundPlan(
        round=1,
        snapshot=snapshot,
        first_key=0,
        last_key=RECENT - 1,
        fast="checkpoints/fast.safetensors",
        anchor=0,
        tokens=RECENT * cfg.model.context,
        steps=12,
        seed=7,
    )
    return Bench(run_dir, setting, plan, {source: 8.0 for source in setting.sources})


def wait_for(reached: Callable[[], Any], timeout: float) -> Any:
    """Poll until something holds, and return it."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if found := reached():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not reached within {timeout:.0f} s")
