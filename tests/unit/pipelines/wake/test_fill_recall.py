"""What a learner's recall reads at a start: the store's base, then its stream up to a key, never dreams."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator, List

import numpy as np
import pytest

from nl_model.recall import ROWS, Recall
from pipelines.experience import ExperienceStore, Record, Snapshot, dream_key
from pipelines.wake import learner

CONTEXT = 16


def filled(run_dir: Path, last_key: int) -> Recall:
    """`Learner._fill_recall` on a store, without the rest of a learner."""
    recall, cfg = Recall(1 << 12), SimpleNamespace(model=SimpleNamespace(context=CONTEXT))
    host = SimpleNamespace(experience=lambda: Snapshot.open(run_dir / "store"))
    learner.Learner._fill_recall(SimpleNamespace(cfg=cfg, host=host, last_key=last_key), recall)  # type: ignore[arg-type]
    return recall


def record(key: int, kind: str, seed: int, **more: Any) -> Record:
    tokens = np.random.default_rng(seed).integers(0, 300, CONTEXT + 1).astype(np.uint16)
    return Record(key=key, source=kind, kind=kind, tokens=tokens, **more)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ExperienceStore]:
    with ExperienceStore.open(tmp_path / "store", CONTEXT, np.dtype("uint16")) as opened:
        yield opened


def read_by_hand(records: List[Record]) -> np.ndarray:
    recall = Recall(1 << 12)
    for one in records:
        recall.observe(one.tokens[None])
    return recall.table_KN


def test_base_then_stream_up_to_the_key(store: ExperienceStore, tmp_path: Path) -> None:
    assert filled(tmp_path, -1).is_empty
    base = [record(-1 - i, "base", i) for i in range(3)]
    stream = [record(i, "quarantined" if i == 7 else "real", 100 + i) for i in range(2 * ROWS)]
    dreams = [record(dream_key(1, 0), "dream", 999, parents=(3,))]
    store.append([*base, *stream], {"next": len(stream)})
    store.append(dreams, {"next": len(stream)})
    store.commit()
    for last in (-1, 0, 7, ROWS, len(stream) - 1):
        np.testing.assert_array_equal(filled(tmp_path, last).table_KN, read_by_hand([*base, *stream[: last + 1]]))


def test_of_a_long_store_the_end_is_read(
    store: ExperienceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = [record(i, "real", i) for i in range(40)]
    store.append(stream, {"next": 40})
    store.commit()
    monkeypatch.setattr(learner, "RECALL_TOKENS", 10 * CONTEXT)
    np.testing.assert_array_equal(filled(tmp_path, 29).table_KN, read_by_hand(stream[20:30]))
