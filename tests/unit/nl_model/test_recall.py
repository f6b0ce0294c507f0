"""Recall: a proper distribution, no look ahead, nothing but the text read in its order."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nl_model.losses import token_nll
from nl_model.recall import FIRST, LENGTHS, ROWS, RUNS, Recall, loss_of_remembered

V = 7


def text(rows: int, length: int = 24, seed: int = 0, vocab: int = V) -> np.ndarray:
    """Text that repeats itself: pieces of a few words in random order."""
    random = np.random.default_rng(seed)
    words = [random.integers(vocab, size=random.integers(2, 6)) for _ in range(6)]
    found = np.concatenate([words[i] for i in random.integers(6, size=rows * length)])
    return found[: rows * length].reshape(rows, length).astype(np.int64)


def logits_of(rows: np.ndarray, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(rows), rows.shape[1] - 1, V, generator=generator)


def read(recall: Recall, rows: np.ndarray, logits: torch.Tensor) -> np.ndarray:
    return recall.read(rows, logits, token_nll(logits, torch.from_numpy(rows)[:, 1:]))


def warmed(seed: int = 3) -> Recall:
    recall = Recall(1 << 10)
    for rows in np.split(text(24, seed=seed), 6):
        read(recall, rows, logits_of(rows, seed))
    return recall


def test_probabilities_of_all_next_tokens_add_up_to_one() -> None:
    recall, rows = warmed(), text(3, seed=3)
    logits, found = logits_of(rows), copy.deepcopy(recall).observe(rows)
    assert (found.runs_BKT == RUNS).any() and (found.runs_BKT == 0).any()
    total = np.zeros(logits.shape[:2])
    for token in range(V):
        targets = torch.full(logits.shape[:2], token)
        nll = token_nll(logits, targets)
        others = loss_of_remembered(logits, nll, targets, torch.from_numpy(found.tokens_BKT))
        mixed = copy.deepcopy(recall).mix(found, nll.double().numpy(), others.double().numpy(), targets.numpy())
        total += np.exp(-mixed)
    np.testing.assert_allclose(total, 1.0, atol=1e-6)


def test_a_loss_depends_on_nothing_that_comes_later() -> None:
    rows = text(4, seed=3)
    other, row, place = rows.copy(), 2, 11
    other[row, place:] = (other[row, place:] + 1) % V
    other[row + 1 :] = (other[row + 1 :] + 2) % V
    logits = logits_of(rows)
    mine, theirs = read(warmed(), rows, logits), read(warmed(), other, logits)
    np.testing.assert_array_equal(mine[:row], theirs[:row])
    np.testing.assert_array_equal(mine[row, : place - 1], theirs[row, : place - 1])
    assert (mine[row, place - 1 :] != theirs[row, place - 1 :]).all()


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 11), max_size=4), slots=st.sampled_from([1, 16, 1 << 12]))
def test_what_is_remembered_does_not_depend_on_how_text_was_cut(cuts: list[int], slots: int) -> None:
    rows, whole = text(12, vocab=V) + 250, Recall(slots)
    found = whole.observe(rows.astype(np.uint16))
    parts, again = Recall(slots), []
    for part in np.split(rows, sorted(set(cuts))):
        again.append(parts.observe(part))
    np.testing.assert_array_equal(whole.table_KN, parts.table_KN)
    np.testing.assert_array_equal(found.tokens_BKT, np.concatenate([h.tokens_BKT for h in again]))
    np.testing.assert_array_equal(found.runs_BKT, np.concatenate([h.runs_BKT for h in again]))
    assert whole.bytes == parts.bytes == 8 * slots * len(LENGTHS)


def test_it_remembers_what_came_next_and_how_often_in_a_row() -> None:
    recall, row = Recall(1 << 12), np.array([[1, 2, 3, 4, 5, 6, 1, 2]])
    assert not recall.observe(row).runs_BKT.any()
    recall.observe(row)
    found = recall.observe(np.array([[1, 2, 3, 4, 5, 6, 1, 3]]))
    longest = LENGTHS.index(6)
    assert found.tokens_BKT[0, longest, 5] == 1 and found.runs_BKT[0, longest, 5] == 2
    assert found.tokens_BKT[0, longest, 6] == 2  # what it found is the row before, not this one
    assert not found.runs_BKT[0, longest, :5].any()  # a context does not reach beyond its sequence
    assert recall.observe(row).tokens_BKT[0, longest, 6] == 3


def test_repeated_text_gets_cheap_and_random_text_hardly_dearer() -> None:
    flat = torch.zeros(8, 23, V)
    repeated, recall = text(8, seed=5), Recall(1 << 12)
    for _ in range(8):
        last = read(recall, repeated, flat).mean()
    assert last < 0.35 * np.log(V)
    random = np.random.default_rng(0)
    recall = Recall(1 << 12)
    losses = [read(recall, random.integers(V, size=(8, 24)), flat).mean() for _ in range(150)]
    assert np.mean(losses[-50:]) < 1.01 * np.log(V)


def test_a_sequence_without_a_finite_loss_teaches_nothing() -> None:
    rows = text(4, seed=3)
    logits = logits_of(rows)
    broken = logits.clone()
    broken[1] = np.nan
    recall, clean = warmed(), warmed()
    mixed = read(recall, rows, broken)
    assert np.isnan(mixed[1]).all() and np.isfinite(mixed[[0, 2, 3]]).all()
    found = clean.observe(rows)
    kept = [0, 2, 3]
    sound = type(found)(found.tokens_BKT[kept], found.runs_BKT[kept])
    targets = torch.from_numpy(rows[kept])[:, 1:]
    nll = token_nll(logits[kept], targets)
    others = loss_of_remembered(logits[kept], nll, targets, torch.from_numpy(sound.tokens_BKT))
    again = clean.mix(sound, nll.double().numpy(), others.double().numpy(), targets.numpy())
    np.testing.assert_array_equal(mixed[kept], again)
    np.testing.assert_array_equal(recall.weights, clean.weights)
    assert np.isnan(read(recall, rows, torch.full_like(logits, np.nan))).all()


def test_it_goes_on_from_its_state_to_the_bit() -> None:
    recall, rows = warmed(), text(6, seed=8)
    kept = {name: tensor.clone() for name, tensor in recall.state().items()}
    expected = read(recall, rows, logits_of(rows))
    again = Recall(1 << 10)
    assert again.is_empty and (again.weights == FIRST).all()
    again.load_state(kept)
    assert not again.is_empty and not (again.weights == FIRST).all()
    np.testing.assert_array_equal(read(again, rows, logits_of(rows)), expected)
    np.testing.assert_array_equal(again.table_KN, recall.table_KN)


def test_a_state_that_is_not_there_or_of_another_shape_is_left() -> None:
    recall, kept = Recall(16), warmed().state()
    recall.load_state({})
    recall.load_state({"recall/weights": kept["recall/weights"][:-1], "recall/table": kept["recall/table"]})
    assert recall.is_empty and (recall.weights == FIRST).all()
    recall.load_state(kept)  # with more slots: what was learned of the weights still holds
    assert recall.is_empty and not (recall.weights == FIRST).all()


def test_much_text_is_remembered_as_if_it_had_been_heard() -> None:
    rows, one, other = text(2 * ROWS + 3), Recall(1 << 12), Recall(1 << 12)
    one.observe(rows)
    other.remember(rows)
    np.testing.assert_array_equal(one.table_KN, other.table_KN)


@pytest.mark.parametrize(("rows", "length"), [(0, 24), (2, 1), (2, 2), (2, 5)])
def test_no_text_and_short_text(rows: int, length: int) -> None:
    sequences, recall = np.zeros((rows, length), np.int64), Recall(16)
    logits = torch.zeros(rows, length - 1, V)
    for _ in range(2):
        found = recall.read(sequences, logits, token_nll(logits, torch.from_numpy(sequences)[:, 1:]))
        assert found.shape == (rows, length - 1) and np.isfinite(found).all()


def test_bf16_logits() -> None:
    rows = text(4, seed=3)
    logits = logits_of(rows).bfloat16()
    np.testing.assert_allclose(read(warmed(), rows, logits), read(warmed(), rows, logits.float()), atol=1e-5)


@pytest.mark.parametrize(("slots", "fitting"), [(0, 1), (-4, 1), (3, 2), (1000, 512), (1 << 40, 1 << 32)])
def test_slots_are_a_power_of_two(slots: int, fitting: int) -> None:
    with pytest.raises(ValueError, match=f"{slots} slots.*such as {fitting}$"):
        Recall(slots)


@pytest.mark.parametrize("token", [1 << 24, -1])
def test_tokens_must_fit(token: int) -> None:
    with pytest.raises(ValueError, match="from 0 to 16777215, this text has"):
        Recall(4).observe(np.array([[3, token, 3]]))
