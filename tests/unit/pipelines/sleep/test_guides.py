"""Stored guides: what was computed is what is read back, by key, from any number of files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict, Iterator, List

import numpy as np
import pytest
import torch

from nl_model.config import LevelConfig
from nl_model.distillation import TopK, divergence, top_k
from nl_model.model import NestedLM
from pipelines.experience import ExperienceStore, Record, Snapshot
from pipelines.sleep.guides import StoredGuides, measure_guides, write_guides

CONTEXT, ROWS, K, VOCAB = 16, 21, 5, 257


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Snapshot]:
    """Three rows of a base mixture and streamed ones, of random tokens."""
    path, random = tmp_path_factory.mktemp("guides") / "store", np.random.default_rng(0)
    with ExperienceStore.open(path, CONTEXT, "uint16") as store:
        for key in (-1, -2, -3, *range(ROWS - 3)):
            kind = "base" if key < 0 else "real"
            tokens = random.integers(0, VOCAB, CONTEXT + 1)
            store.append([Record(key=key, source="s", kind=kind, surprise=1.0, tokens=tokens)])
        store.commit()
    yield Snapshot.open(path)


@pytest.fixture(scope="module")
def teacher(make_model: Callable[..., NestedLM], make_levels: Callable[..., Dict[str, LevelConfig]]) -> NestedLM:
    return make_model(make_levels(), VOCAB, 3)


def write(folder: Path, teacher: NestedLM, snapshot: Snapshot, world: int) -> List[Path]:
    rows = np.arange(ROWS)
    paths = [folder / f"{rank}.arrow" for rank in range(world)]
    for rank, path in enumerate(paths):
        assert write_guides(path, teacher, snapshot, rows[rank::world], K, batch=4) == len(rows[rank::world]) * CONTEXT
    return paths


def by_teacher(teacher: NestedLM, snapshot: Snapshot, rows: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = teacher(torch.from_numpy(snapshot.tokens(rows).astype(np.int64))[:, :-1])
    return found


@pytest.mark.parametrize("world", [1, 3])
def test_what_is_read_is_what_the_teacher_said(
    world: int, tmp_path: Path, teacher: NestedLM, snapshot: Snapshot
) -> None:
    stored = StoredGuides(write(tmp_path, teacher, snapshot, world))
    assert stored.keys.tolist() == sorted(snapshot.keys.tolist())
    rows = np.array([20, 4, 4, 0, 11])  # any order, more than once
    logits = by_teacher(teacher, snapshot, rows)
    found, expected = stored.lookup(snapshot.keys[rows], torch.device("cpu")), top_k(logits, K)
    assert found.ids_TK.dtype == torch.int64 and torch.equal(found.ids_TK, expected.ids_TK)
    assert found.log_p_TK.dtype == found.log_tail_T.dtype == torch.float32
    torch.testing.assert_close(found.log_p_TK, expected.log_p_TK, rtol=2**-11, atol=0)
    torch.testing.assert_close(found.log_tail_T, expected.log_tail_T, rtol=2**-11, atol=1e-7)
    student = torch.randn(5, CONTEXT, VOCAB, generator=torch.Generator().manual_seed(0))
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        exact = divergence(student, expected, kind)
        torch.testing.assert_close(divergence(student, found, kind), exact, rtol=5e-3, atol=1e-3)


def test_the_same_round_writes_the_same_bytes(tmp_path: Path, teacher: NestedLM, snapshot: Snapshot) -> None:
    first = [path.read_bytes() for path in write(tmp_path, teacher, snapshot, 2)]
    assert [path.read_bytes() for path in write(tmp_path, teacher, snapshot, 2)] == first
    assert {path.name for path in tmp_path.iterdir()} == {"0.arrow", "1.arrow"}, "nothing unfinished stays"


def test_a_mapped_guide_outlives_its_name(tmp_path: Path, teacher: NestedLM, snapshot: Snapshot) -> None:
    (path,) = write(tmp_path, teacher, snapshot, 1)
    stored = StoredGuides([path])
    before = stored.lookup(snapshot.keys[:2], torch.device("cpu"))
    path.unlink()
    after = stored.lookup(snapshot.keys[:2], torch.device("cpu"))
    assert torch.equal(before.log_p_TK, after.log_p_TK) and stored.bytes > 0


def test_keys_without_a_guide_are_not_covered(tmp_path: Path, teacher: NestedLM, snapshot: Snapshot) -> None:
    path = tmp_path / "some.arrow"
    write_guides(path, teacher, snapshot, np.array([5, 3]), K)
    stored = StoredGuides([path])
    assert stored.covers(snapshot.keys[[3, 5, 3]]) and not stored.covers(snapshot.keys[[3, 4]])
    with pytest.raises(AssertionError, match="not stored"):
        stored.lookup(snapshot.keys[[4]], torch.device("cpu"))
    write_guides(path, teacher, snapshot, np.empty(0, np.int64), K)
    nothing = StoredGuides([path])
    assert len(nothing.keys) == 0 and not nothing.covers(snapshot.keys[:1])


def test_damaged_and_missing_files_are_named(tmp_path: Path, teacher: NestedLM, snapshot: Snapshot) -> None:
    with pytest.raises(ValueError, match=r"gone\.arrow is no file of stored guides"):
        StoredGuides([tmp_path / "gone.arrow"])
    (path,) = write(tmp_path, teacher, snapshot, 1)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"0\.arrow is no file of stored guides"):
        StoredGuides([path])


def test_all_tokens_may_be_named_and_large_vocabularies_have_wide_ids(tmp_path: Path, snapshot: Snapshot) -> None:
    model = _Constant(torch.linspace(0, 1, 70_000))
    write_guides(tmp_path / "wide.arrow", model, snapshot, np.arange(2), 3)  # type: ignore[arg-type]
    found = StoredGuides([tmp_path / "wide.arrow"]).lookup(snapshot.keys[:2], torch.device("cpu"))
    assert found.ids_TK[0, 0].tolist() == [69_999, 69_998, 69_997]
    model = _Constant(torch.linspace(0, 1, 300))
    write_guides(tmp_path / "all.arrow", model, snapshot, np.arange(2), 999)  # type: ignore[arg-type]
    found = StoredGuides([tmp_path / "all.arrow"]).lookup(snapshot.keys[:2], torch.device("cpu"))
    assert found.ids_TK.shape == (2, CONTEXT, 300) and bool((found.log_tail_T == -torch.inf).all())


class _Constant(torch.nn.Module):
    """A teacher that always says the same."""

    def __init__(self, logits_V: torch.Tensor) -> None:
        super().__init__()
        self.logits_V = torch.nn.Parameter(logits_V)
        self.vocab_size = len(logits_V)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        return self.logits_V.expand(*tokens_BT.shape, -1)


def test_measured_costs_add_up(tmp_path: Path, teacher: NestedLM, snapshot: Snapshot) -> None:
    costs = measure_guides(teacher, snapshot, np.arange(ROWS), K, tmp_path, repeats=1, batch=4)
    assert min(costs.recompute, costs.write, costs.read) > 0
    payload = K * (2 + 2) + 2 + 8 / CONTEXT
    assert payload < costs.stored_bytes < costs.logits_bytes == 4 * VOCAB
    assert list(tmp_path.iterdir()) == []
    assert replace(costs, recompute=3.0, read=1.0, write=5.0).visits_to_pay == 2.5
    assert replace(costs, recompute=1.0, read=1.0).visits_to_pay == float("inf")


def test_top_k_parts_are_picked_together() -> None:
    guide = top_k(torch.randn(4, 3, 9, generator=torch.Generator().manual_seed(0)), 2)
    some = guide[torch.tensor([True, False, True, False])]
    assert isinstance(some, TopK) and some.ids_TK.shape == (2, 3, 2) and some.log_tail_T.shape == (2, 3)
