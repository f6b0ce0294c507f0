"""Dreams in a round: from the awake model to the candidate's folder, and from a release into the store, once."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Dict, List

import numpy as np
import pytest

from cluster.actors.experience_service import ExperienceService
from cluster.pool.dreaming import dream_together
from cluster.pool.host import RankHost
from cluster.storage.releases import Release, Releases
from nl_model.config import LevelConfig
from nl_model.model import NestedLM
from pipelines.config.dreams import DreamConfig
from pipelines.config.schema import Config, StoreConfig
from pipelines.data.tokens import ByteTokenizer
from pipelines.dreams.file import read_dreams
from pipelines.experience import DREAM_KEY, ExperienceStore, Record, Snapshot, verify
from pipelines.sleep.plan import RoundPlan
from pipelines.sleep.round import Pinned

CONTEXT, STREAMED = 16, 60
PLAN = RoundPlan(4, 1, 10, STREAMED - 1, "fast", 0, 640, 6, 5, dreams_stored=7)
CFG = DreamConfig(share=0.25, cap=1.0, keep_top=3, keep_random=2, band=50.0, max_copied=1.0)


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    texts = np.random.default_rng(0).integers(0, 257, (STREAMED, CONTEXT + 1))
    with ExperienceStore.open(tmp_path / "store", CONTEXT, "uint16") as store:
        store.append(
            [Record(key=k, source="s", surprise=1.0 + k % 7, tokens=t) for k, t in enumerate(texts)], {"at": STREAMED}
        )
        store.commit()
    return Snapshot.open(tmp_path / "store")


@pytest.fixture
def model(make_model: Callable[..., NestedLM], make_levels: Callable[..., Dict[str, LevelConfig]]) -> NestedLM:
    return make_model(make_levels(), 257, 1)


def served(path: Path, directory: Path, times: int) -> List[int]:
    """Versions that a service answers with when told of a release's dreams."""

    async def tell() -> List[int]:
        service = ExperienceService(str(path), CONTEXT, "uint16", StoreConfig())
        versions = [await service.append_dreams(str(directory)) for _ in range(times)]
        await service.close()
        return versions

    return asyncio.run(tell())


def test_a_release_brings_its_dreams_into_the_store_once(
    make_config: Callable[..., Config], model: NestedLM, snapshot: Snapshot, tmp_path: Path
) -> None:
    cfg, releases = make_config(dreams=CFG), Releases(tmp_path / "releases")
    directory = releases.prepare(1)
    share = dream_together(cfg, PLAN, snapshot, model, directory, ByteTokenizer(), (0, 1))
    assert share.tokens is not None and share.record is not None and share.passes > 0
    records = read_dreams(directory)
    assert [r.tokens.tolist() for r in records] == share.tokens.tolist() and len(records) == 5
    assert share.record["stored"] == 12 and share.record["kept"] == 5
    later = dream_together(cfg, PLAN, snapshot, model, directory, ByteTokenizer(), (1, 1))
    assert np.array_equal(later.tokens, share.tokens) and later.record is None, "other ranks read what rank 0 wrote"

    releases.publish(Release(1, 0, 4, 1, STREAMED - 1, 640, "", [], {"dreams": share.record}))
    for _ in range(2):  # a coordinator that died after the append tells it again, to a new service
        first, second = served(tmp_path / "store", directory, 2)
        assert first == second
    report, stored = verify(tmp_path / "store"), Snapshot.open(tmp_path / "store")
    assert report.ok and report.rows == STREAMED + 5 and stored.last_key == STREAMED - 1
    assert stored.cursor == {"at": STREAMED}
    assert stored.tokens(np.flatnonzero(stored.keys >= DREAM_KEY)).tolist() == share.tokens.tolist()


def test_an_attempt_after_a_crash_dreams_the_same(
    make_config: Callable[..., Config], model: NestedLM, snapshot: Snapshot, tmp_path: Path
) -> None:
    releases, found = Releases(tmp_path / "releases"), []
    for _ in range(2):
        directory = releases.prepare(1)
        dream_together(make_config(dreams=CFG), PLAN, snapshot, model, directory, ByteTokenizer(), (0, 1))
        found.append((directory / "dreams.arrow").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize(("share", "steps"), [(0.0, 6), (0.25, 0)], ids=["no share", "no steps"])
def test_without_a_share_of_any_step_nobody_dreams(
    share: float,
    steps: int,
    make_config: Callable[..., Config],
    model: NestedLM,
    snapshot: Snapshot,
    tmp_path: Path,
) -> None:
    cfg, pinned = (
        make_config(dreams=replace(CFG, share=share)),
        Pinned(replace(PLAN, steps=steps), snapshot, {}, {}, {}),
    )
    found = RankHost.dream(SimpleNamespace(cfg=cfg, directory=tmp_path), pinned, model)  # type: ignore[arg-type]
    assert found.tokens is None and found.record is None and not read_dreams(tmp_path)
