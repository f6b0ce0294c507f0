"""Needles and BABILong stories: the answer can be found in the text, nothing leaks from training into tests."""

from __future__ import annotations

import random
import re
from typing import Callable, List, Tuple

import numpy as np
import pytest

from nl_model.probes import IGNORE, stream
from nl_model.probes.babilong import Story, babilong, read_stories, story_words
from nl_model.probes.needle import KEYS, KINDS, TEMPLATE_WORDS, needle
from nl_model.probes.text import Background, Words, scatter, sentences, tokenize

BABI = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Mary moved to the garden.
6 Where is Mary? \tgarden\t5
1 Sandra journeyed to the office.
2 Where is Sandra? \toffice\t1
"""


def prose(number: int = 200) -> str:
    rng = random.Random(0)
    nouns = "ship captain sea parrot chest map rum coast fog sail".split()  # noqa: SIM905
    return " ".join(
        " ".join(rng.choice(nouns) for _ in range(rng.randint(8, 13))).capitalize() + f" {i}." for i in range(number)
    )


@pytest.fixture(scope="module")
def background() -> Background:
    return Background(sentences(prose()))


@pytest.fixture(scope="module")
def words(background: Background) -> Words:
    return Words.of(TEMPLATE_WORDS | story_words(read_stories(BABI)), background.sentences, size=256)


def text_and_answer(words: Words, inputs: np.ndarray, targets: np.ndarray) -> Tuple[List[str], List[str]]:
    """Text up to the question mark, and the answer as asked for; teacher forcing shows its tokens but the last."""
    asked = np.flatnonzero(targets != IGNORE)
    assert np.array_equal(asked, np.arange(asked[0], asked[0] + len(asked))), "the answer is asked for in one piece"
    answer = targets[asked]
    assert np.array_equal(inputs[asked[1:]], answer[:-1])
    assert (inputs[asked[-1] + 1 :] == 0).all()
    return words.decode(inputs[: asked[0] + 1]), words.decode(answer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [256, 300])
def test_needles_can_be_read_off_the_text(kind: str, length: int, words: Words, background: Background) -> None:
    probe = needle(kind, length, words, background)
    inputs, targets = probe.sample(stream(0, "test"), 30, "test")
    assert inputs.shape == (30, length) and probe.score == "sequence"
    for row, wanted in zip(inputs, targets, strict=True):
        tokens, answer = text_and_answer(words, row, wanted)
        text = " ".join(tokens)
        stated = dict(re.findall(r"the secret of the (\w+) is ([0-9a-f -]+) \.", text))
        assert len(stated) == (4 if kind == "multikey" else 1)
        question = re.search(r"what is the secret of the (\w+) \?$", text)
        assert question and question[1] in KEYS
        assert stated[question[1]] == " ".join(answer)
        shape = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}" if kind == "single-3" else r"[1-9][0-9]{6}"
        assert re.fullmatch(shape, "".join(answer))
        assert (row != 0).all(), "the haystack fills the length"


def test_needles_lie_everywhere(words: Words, background: Background) -> None:
    inputs, _ = needle("single-2", 256, words, background).sample(stream(0, "train"), 300, "train")
    place = [(words.decode(row).index("secret") - 1) / 230 for row in inputs]
    assert min(place) < 0.1 and max(place) > 0.85 and 0.4 < np.mean(place) < 0.6


def test_background_of_tests_is_not_that_of_training(background: Background) -> None:
    seen = {
        split: {s for i in range(200) for s in background.fill(np.random.default_rng(i), 60, split)[:-1]}
        for split in ("train", "test")
    }
    assert seen["train"] and seen["test"] and not seen["train"] & seen["test"]
    for i in range(50):
        taken = background.fill(np.random.default_rng(i), 60, "train")
        assert sum(map(len, taken)) == 60
        at = background.sentences.index(taken[0])
        for sentence, whole in zip(taken, background.sentences[at:160], strict=False):
            assert sentence == whole or (sentence is taken[-1] and sentence == whole[: len(sentence)])


def test_short_sentences_are_skipped() -> None:
    assert sentences("One two three. A b c d e f g h i j! Then no.") == [(*"abcdefghij", "!")]


def test_facts_keep_their_order_between_the_sentences() -> None:
    facts, prose_part = [("f", str(i)) for i in range(4)], [("p", str(i)) for i in range(9)]
    for seed in range(20):
        mixed = scatter(np.random.default_rng(seed), facts, prose_part)
        assert [s for s in mixed if s[0] == "f"] == facts and [s for s in mixed if s[0] == "p"] == prose_part


def test_stories_leave_earlier_questions_out() -> None:
    first, second, third = read_stories(BABI)
    assert [" ".join(f) for f in second.facts] == [
        "mary moved to the bathroom .",
        "john went to the hallway .",
        "daniel went back to the hallway .",
        "mary moved to the garden .",
    ]
    assert (first.answer, second.answer, third.answer) == ("bathroom", "garden", "office")
    assert third == Story(
        (("sandra", "journeyed", "to", "the", "office", "."),), ("where", "is", "sandra", "?"), "office"
    )


@pytest.mark.parametrize("length", [0, 64, 128])
def test_babilong_answers_follow_from_the_facts(length: int, words: Words, background: Background) -> None:
    stories = read_stories(BABI)
    probe = babilong("qa1", length, {"train": stories[:2], "test": stories}, words, background)
    inputs, targets = probe.sample(stream(0, "test"), 40, "test")
    assert length in (0, inputs.shape[1])
    answers = set()
    for row, wanted in zip(inputs, targets, strict=True):
        tokens, answer = text_and_answer(words, row, wanted)
        text = " ".join(tokens)
        question = re.search(r"where is (\w+) \?$", text)
        assert question
        moves = re.findall(rf"{question[1]} (?:moved|went|journeyed)(?: back)? to the (\w+) \.", text)
        assert [moves[-1]] == answer
        answers.add(answer[0])
        if length:
            assert (row != 0).all()
    assert answers == {"bathroom", "garden", "office"}
    trained = probe.sample(stream(0, "train"), 40, "train")[1]
    assert set(words.decode(trained[trained != IGNORE])) == {"bathroom", "garden"}


def test_words_keep_what_is_asked_for_and_the_most_frequent() -> None:
    words = Words.of({"z", "y"}, [("a", "b", "a", "z"), ("c", "b", "a", "d")], size=6)
    assert words.words == ("y", "z", "a", "b") and words.vocab_size == 6
    assert words.encode(["a", "c", "z"]) == [4, 1, 3] and words.decode([4, 0, 1, 3]) == ["a", "?unknown", "z"]
    assert tokenize("It's 42, Mary!") == ["it", "'", "s", "4", "2", ",", "mary", "!"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda words, prose: needle("single-4", 256, words, prose), "single-4"),
        (lambda words, prose: needle("single-2", 256, words), "background"),
        (lambda words, prose: needle("multikey", 60, words, prose), "length=60"),
        (lambda words, prose: needle("single-1", 256, Words(("a",))), "words lack"),
        (lambda words, prose: babilong("qa1", 64, {"train": [], "test": []}, words), "length=64 needs a background"),
        (
            lambda words, prose: babilong("qa1", 8, dict.fromkeys(("train", "test"), read_stories(BABI)), words, prose),
            "fits",
        ),
        (
            lambda words, prose: babilong("qa1", 0, dict.fromkeys(("train", "test"), read_stories(BABI)), Words(())),
            "lack",
        ),
        (lambda words, prose: read_stories("Mary moved."), "number"),
        (lambda words, prose: read_stories("1 A.\n2 Where? \tnorth,east\t1"), "not one word"),
        (lambda words, prose: Words.of({"a", "b"}, size=3), "size=3"),
        (lambda words, prose: Background([]).fill(np.random.default_rng(0), 9, "test"), "no sentence"),
    ],
)
def test_wrong_settings_are_named(
    build: Callable[[Words, Background], object], message: str, words: Words, background: Background
) -> None:
    with pytest.raises(ValueError, match=message):
        build(words, background)
