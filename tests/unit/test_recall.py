"""Recall: a proper distribution, no look ahead, nothing but the text heard in its order."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nl_model.losses import token_nll
from nl_model.recall import FIRST, LENGTHS, RUNS, Recall, loss_of_remembered, score_with

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
    tokens = torch.from_numpy(rows)
    return recall.read(tokens, logits, token_nll(logits, tokens[:, 1:])).numpy()


def warmed(seed: int = 3) -> Recall:
    recall = Recall(1 << 10)
    for rows in np.split(text(24, seed=seed), 6):
        read(recall, rows, logits_of(rows, seed))
    return recall


def test_probabilities_of_all_next_tokens_add_up_to_one() -> None:
    recall, rows = warmed(), text(3, seed=3)
    logits, heard = logits_of(rows), copy.deepcopy(recall).hear(rows)
    assert (heard.runs_BKT == RUNS).any() and (heard.runs_BKT == 0).any()
    total = np.zeros(logits.shape[:2])
    for token in range(V):
        targets = torch.full(logits.shape[:2], token)
        nll = token_nll(logits, targets)
        others = loss_of_remembered(logits, nll, targets, torch.from_numpy(heard.tokens_BKT))
        mixed = copy.deepcopy(recall).mix(heard, nll.double().numpy(), others.double().numpy(), targets.numpy())
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
    heard = whole.hear(rows.astype(np.uint16))
    parts, again = Recall(slots), []
    for part in np.split(rows, sorted(set(cuts))):
        again.append(parts.hear(part))
    np.testing.assert_array_equal(whole.table_KN, parts.table_KN)
    np.testing.assert_array_equal(heard.tokens_BKT, np.concatenate([h.tokens_BKT for h in again]))
    np.testing.assert_array_equal(heard.runs_BKT, np.concatenate([h.runs_BKT for h in again]))
    assert whole.bytes == parts.bytes == 8 * slots * len(LENGTHS)


def test_it_remembers_what_came_next_and_how_often_in_a_row() -> None:
    recall, row = Recall(1 << 12), np.array([[1, 2, 3, 4, 5, 6, 1, 2]])
    assert not recall.hear(row).runs_BKT.any()
    recall.hear(row)
    heard = recall.hear(np.array([[1, 2, 3, 4, 5, 6, 1, 3]]))
    longest = LENGTHS.index(6)
    assert heard.tokens_BKT[0, longest, 5] == 1 and heard.runs_BKT[0, longest, 5] == 2
    assert heard.tokens_BKT[0, longest, 6] == 2  # what it found is the row before, not this one
    assert not heard.runs_BKT[0, longest, :5].any()  # a context does not reach beyond its sequence
    assert recall.hear(row).tokens_BKT[0, longest, 6] == 3


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
    heard = clean.hear(rows)
    kept = [0, 2, 3]
    sound = type(heard)(heard.tokens_BKT[kept], heard.runs_BKT[kept])
    targets = torch.from_numpy(rows[kept])[:, 1:]
    nll = token_nll(logits[kept], targets)
    others = loss_of_remembered(logits[kept], nll, targets, torch.from_numpy(sound.tokens_BKT))
    again = clean.mix(sound, nll.double().numpy(), others.double().numpy(), targets.numpy())
    np.testing.assert_array_equal(mixed[kept], again)
    np.testing.assert_array_equal(recall.weights, clean.weights)
    assert np.isnan(read(recall, rows, torch.full_like(logits, np.nan))).all()


def test_state_is_the_weights_and_the_rest_is_heard_again() -> None:
    recall, rows = warmed(), text(24, seed=3)
    again = Recall(1 << 10)
    again.load_state(recall.state())
    again.hear(rows)
    np.testing.assert_array_equal(again.weights, recall.weights)
    np.testing.assert_array_equal(again.table_KN, recall.table_KN)
    assert (Recall(4).weights == FIRST).all() and not (recall.weights == FIRST).all()
    before = again.weights
    again.load_state({})  # of a run that had none
    assert again.weights is before


def test_scores_with_a_graph_and_without() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(V, 8), torch.nn.Linear(8, V))
    rows = torch.from_numpy(text(3))
    tokens = torch.from_numpy(Recall(16).hear(rows.numpy()).tokens_BKT)
    nll, others = score_with(model, rows, tokens)
    assert nll.requires_grad and not others.requires_grad
    expected = -model(rows[:, :-1]).log_softmax(-1).gather(-1, tokens.mT).mT
    torch.testing.assert_close(others, expected.detach())


@pytest.mark.parametrize("slots", [0, -4, 3, 1000])
def test_slots_are_a_power_of_two(slots: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        Recall(slots)


def test_tokens_must_fit() -> None:
    with pytest.raises(ValueError, match="16777216"):
        Recall(4).hear(np.full((1, 3), 1 << 24))
