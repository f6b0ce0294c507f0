"""Recall, MAD and formal-language probes: an independent solver finds every answer in its input, seeds reproduce."""

from __future__ import annotations

import re
from typing import Callable, Dict, List, Set, Tuple

import numpy as np
import pytest

from nl_model.probes import IGNORE, Probe, stream
from nl_model.probes.formal import BINS, LANGUAGES, language
from nl_model.probes.mad import (
    compression,
    fuzzy_recall,
    in_context_recall,
    memorization,
    noisy_recall,
    selective_copy,
)
from nl_model.probes.probe import distinct
from nl_model.probes.recall import mqar, overwrite_mqar

Row = List[int]
Answers = Dict[int, int]
Solver = Callable[[Row], Answers]
N = 60


def lookup(pairs: int) -> Solver:
    """Read the pairs in front into a dictionary (the last one wins), then look up every later key."""

    def solve(row: Row) -> Answers:
        known = {row[2 * i]: row[2 * i + 1] for i in range(pairs)}
        return {t: known[token] for t, token in enumerate(row) if t >= 2 * pairs and token != 0}

    return solve


def recall_without(noise: Set[int]) -> Solver:
    def solve(row: Row) -> Answers:
        known: Dict[int, int] = {}
        answers: Answers = {}
        places = [t for t, token in enumerate(row) if token not in noise]
        for key_at, value_at in zip(places[::2], places[1::2], strict=True):
            assert value_at == key_at + 1, "no noise inside a pair"
            if row[key_at] in known:
                answers[key_at] = known[row[key_at]]
            known[row[key_at]] = row[value_at]
        return answers

    return solve


def fuzzy(row: Row) -> Answers:
    """Split "key value" runs at the change of half of the vocabulary, remember them, follow the known ones."""
    text = "".join(chr(ord("a") + token) for token in row if token)
    known: Dict[str, str] = {}
    answers: Answers = {}
    at = 0
    while at < len(text):
        ends = [key for key in known if text.startswith(key, at)]
        assert len(ends) <= 1, "known keys are prefix-free"
        if ends:
            key = ends[0]
            for i, token in enumerate(known[key]):
                answers[at + len(key) - 1 + i] = ord(token) - ord("a")
            at += len(key) + len(known[key])
        else:
            match = re.compile("([a-h]+)([i-p]+)").match(text, at)
            assert match
            known[match[1]] = match[2]
            at = match.end()
    return answers


def copy(row: Row) -> Answers:
    content = [token for token in row if token < 14]
    return dict(zip([t for t, token in enumerate(row) if token == 15], content, strict=True))


def echo(row: Row) -> Answers:
    assert row[-1] == 15
    return dict(enumerate(row[:-1]))


SOLVED: Dict[str, Tuple[Probe, Solver]] = {
    "mqar": (mqar(), lookup(4)),
    "mqar, longer": (mqar(512, 128, 8), lookup(8)),
    "mqar, 8k": (mqar(8192, 256, 16), lookup(16)),
    "overwrite": (overwrite_mqar(), lookup(6)),
    "recall": (in_context_recall(), recall_without(set())),
    "noisy": (noisy_recall(), recall_without(set(range(16, 32)))),
    "fuzzy": (fuzzy_recall(), fuzzy),
    "copy": (selective_copy(), copy),
    "compress": (compression(), echo),
}


@pytest.mark.parametrize("name", SOLVED)
def test_an_independent_solver_finds_every_answer(name: str) -> None:
    probe, solve = SOLVED[name]
    inputs, targets = probe.sample(stream(1, "test"), N, "test")
    assert inputs.min() >= 0 and inputs.max() < probe.vocab_size
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert solve(row) == {t: target for t, target in enumerate(wanted) if target != IGNORE}


@pytest.mark.parametrize("name", [*SOLVED, *LANGUAGES])
def test_seeds_reproduce_and_splits_differ(name: str) -> None:
    probe = SOLVED[name][0] if name in SOLVED else language(name)
    first, again = (probe.sample(stream(5, "train"), N, "train") for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].dtype == first[1].dtype == np.int64 and first[0].shape == first[1].shape
    other = probe.sample(stream(6, "train"), N, "train")[0]
    assert not np.array_equal(first[0], other)


@pytest.mark.parametrize("name", [name for name in SOLVED if name != "mqar, 8k"])
def test_no_test_sequence_is_a_training_sequence(name: str) -> None:
    probe = SOLVED[name][0]
    train = {row.tobytes() for row in probe.sample(stream(0, "train"), 2000, "train")[0]}
    test = {row.tobytes() for row in probe.sample(stream(0, "test"), 500, "test")[0]}
    assert len(train) == 2000 and len(test) == 500, "sequences do not repeat"
    assert not train & test


def test_mqar_asks_each_key_once_after_the_pairs() -> None:
    inputs, targets = mqar(512, 64, 4).sample(stream(0, "test"), N, "test")
    assert ((targets != IGNORE).sum(1) == 4).all() and (targets[:, :8] == IGNORE).all()
    keys, values = inputs[:, 0:8:2], inputs[:, 1:8:2]
    assert keys.min() >= 1 and keys.max() < 256 <= values.min()
    for key, value, row in zip(keys, values, inputs, strict=True):
        assert len(set(key)) == len(set(value)) == 4
        assert sorted(row[8:][row[8:] > 0]) == sorted(key)


def test_a_lesson_of_mqar_uses_few_keys_and_values() -> None:
    inputs, targets = mqar(512, 64, 4, used=6).sample(stream(0, "train"), N, "train")
    assert set(inputs[:, 0:8:2].ravel()) == set(range(1, 7)) and set(inputs[:, 1:8:2].ravel()) == set(range(256, 262))
    assert set(targets.ravel()) == {IGNORE, *range(256, 262)}


def test_gaps_of_mqar_follow_the_power_law() -> None:
    """P(gap) is proportional to gap^(a - 1), for one pair exactly: compare with 20,000 draws."""
    places, power = 10, 0.3
    inputs, _ = mqar(64, 2 + 2 * places, 1, power).sample(stream(0, "test"), 20_000, "test")
    observed = (inputs[:, 2::2] > 0).mean(0)
    wanted = np.arange(1, places + 1) ** (power - 1.0)
    assert np.abs(observed - wanted / wanted.sum()).max() < 0.012  # four standard errors


def test_distinct_numbers_are_uniform_in_every_place() -> None:
    drawn = distinct(np.random.default_rng(0), 20_000, 5, 3)
    assert all(len(set(row)) == 3 for row in drawn[:50].tolist())
    for column in drawn.T:
        assert np.abs(np.bincount(column, minlength=5) / 20_000 - 0.2).max() < 0.012


def test_overwrite_splits_ask_for_updated_or_retained_keys_only() -> None:
    probe = overwrite_mqar(pairs=5, overwritten=2)
    whole, update, retain = (probe.sample(stream(3, "test"), N, split) for split in ("test", "update", "retain"))
    assert np.array_equal(whole[0], update[0]) and np.array_equal(whole[0], retain[0])
    asked = [sample[1] != IGNORE for sample in (whole, update, retain)]
    assert (asked[1].sum(1) == 2).all() and (asked[2].sum(1) == 3).all()
    assert np.array_equal(asked[0], asked[1] | asked[2])
    for row, is_update in zip(whole[0].tolist(), asked[1], strict=True):
        listed = row[0:14:2]
        assert {row[t] for t in np.flatnonzero(is_update)} == {key for key in listed if listed.count(key) == 2}


def test_memorization_is_one_fixed_map() -> None:
    probe = memorization(pairs=32)
    seen: Dict[int, int] = {}
    for split in ("train", "test"):
        inputs, targets = probe.sample(stream(0, split), N, split)
        assert (inputs[:, 1::2] == 64).all() and (targets[:, 0::2] == IGNORE).all()
        for key, value in zip(inputs[:, 0::2].ravel().tolist(), targets[:, 1::2].ravel().tolist(), strict=True):
            assert seen.setdefault(key, value) == value
    assert sorted(seen) == list(range(32)) and sorted(seen.values()) == list(range(32, 64))
    other = memorization(pairs=32, seed=1).sample(stream(0, "test"), N, "test")[1]
    assert not np.array_equal(other, targets)


ALPHABET = {"parity": "01", "aa": "a", "abab": "ab", "anbn": "ab", "anbncn": "abc", "shuffle2": "()[]"}


def is_word(name: str, text: str) -> bool:
    """Membership, written down once more and independently of the generator."""
    n = len(text)
    if name == "parity":
        return text.count("1") % 2 == 0
    if name in ("aa", "abab"):
        return re.fullmatch(f"({name})*", text) is not None
    if name == "anbn":
        return text == "a" * (n // 2) + "b" * (n // 2)
    if name == "anbncn":
        return text == "a" * (n // 3) + "b" * (n // 3) + "c" * (n // 3)
    for pair in ("()", "[]"):
        own = "".join(c for c in text if c in pair)
        while pair in own:
            own = own.replace(pair, "")
        if own:
            return False
    return True


COMPLETIONS: Dict[str, Callable[[str], List[str]]] = {
    "parity": lambda p: ["", "0", "1", "01", "10"],
    "aa": lambda p: ["", "a"],
    "abab": lambda p: ["abab"[i:] for i in range(5)],
    "anbn": lambda p: ["a" * i + "b" * j for i in range(2) for j in range(len(p) + 3)],
    "anbncn": lambda p: [
        "a" * i + "b" * j + "c" * k for i in range(2) for j in range(len(p) + 2) for k in range(len(p) + 2)
    ],
    "shuffle2": lambda p: [
        x + ")" * i + "]" * j for x in ("", "(", "[", ")", "]") for i in range(len(p) + 2) for j in range(len(p) + 2)
    ],
}


def legal(name: str, prefix: str) -> Tuple[str, ...]:
    """Symbols (and the end, as "$") that may follow a prefix, by trying enough completions."""
    words = [rest for rest in COMPLETIONS[name](prefix) if is_word(name, prefix + rest)]
    return tuple(sorted({rest[0] if rest else "$" for rest in words}))


@pytest.mark.parametrize("name", LANGUAGES)
def test_words_belong_to_their_language_and_answers_are_the_legal_continuations(name: str) -> None:
    probe = language(name, ((2, 9), (10, 12)))
    sets: Dict[int, Set[Tuple[str, ...]]] = {}
    known: Dict[str, Tuple[str, ...]] = {}
    for split in probe.splits:
        inputs, targets = probe.sample(stream(0, split), 40, split)
        for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
            text = "".join(ALPHABET[name][token] for token in row if token != probe.vocab_size - 1)
            assert is_word(name, text)
            low, high = (10, 12) if split == "bin1" else (2, 9)
            assert low <= len(text) <= high
            assert all(target == IGNORE for target in wanted[len(text) :])
            for t in range(len(text)):
                prefix = text[: t + 1]
                if prefix not in known:
                    known[prefix] = legal(name, prefix)
                sets.setdefault(wanted[t], set()).add(known[prefix])
    assert all(len(continuations) == 1 for continuations in sets.values()), "a class is one set of continuations"
    assert len({next(iter(c)) for c in sets.values()}) == len(sets), "different classes are different sets"


def test_bins_of_the_languages_hold_their_lengths() -> None:
    for name in LANGUAGES:
        for split, (low, high) in zip(("train", "bin0", "bin1"), (BINS[0], *BINS), strict=True):
            inputs, targets = language(name).sample(stream(0, split), 300, split)
            lengths = (targets != IGNORE).sum(1)
            assert inputs.shape == (300, high)
            assert low <= lengths.min() <= low + 8 and high - 8 <= lengths.max() <= high


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: mqar(length=10, pairs=4), "length=10 must be at least 16"),
        (lambda: mqar(vocab_size=8, pairs=4), "vocab_size"),
        (lambda: mqar(power=0.0), "power=0.0"),
        (lambda: mqar(used=3), "used=3"),
        (lambda: overwrite_mqar(pairs=3, overwritten=3), "overwritten=3"),
        (lambda: selective_copy(length=20), "length=20"),
        (lambda: noisy_recall(noise=1.0), "noise=1.0"),
        (lambda: language("dyck"), "language='dyck'"),
        (lambda: language("abab", ((2, 3), (4, 8))), "multiple of 4"),
        (lambda: mqar().sample(stream(0, "test"), 2, "bin0"), "split='bin0'"),
        (lambda: mqar().sample(stream(0, "test"), 0, "test"), "n=0"),
    ],
)
def test_wrong_settings_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
