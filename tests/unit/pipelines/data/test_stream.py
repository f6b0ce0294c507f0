"""The stream: every token once, limits kept, schedules as promised, and the identical rest from any cursor."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config.schema import SHIPPED_SOURCE_BYTES, BaseConfig, StreamConfig
from pipelines.data.corpus import Corpus, open_corpus
from pipelines.data.schedule import mixed, soft, uniform
from pipelines.data.stream import Cursor, Sequence, Stream, build_probes, select_sources
from pipelines.data.tokens import BPETokenizer, ByteTokenizer, Tokenizer

CONTEXT = 32
NAMES = ["a", "b", "c", "d"]


def words(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return " ".join(f"{rng.choice(['alpha', 'béta', 'gamma'])}{rng.randrange(999)}" for _ in range(count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sources: a long text, many short rows of which some are quarantined, Parquet, and a folder of files."""
    path = tmp_path_factory.mktemp("data")
    (path / "a.txt").write_text("\n\n".join(words(1000 + i, 30) for i in range(60)))
    rows = [
        {"text": words(2000 + i, 1 + i % 9) if i % 17 else "x" * 6000, "subject": f"s{i // 10}"} for i in range(120)
    ]
    (path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.table({"text": [words(3000 + i, 12) for i in range(150)]}), path / "c.parquet", row_group_size=40)
    (path / "d").mkdir()
    for i in range(25):
        (path / "d" / f"{i}.txt").write_text(words(i, 40))
    return path


def config(folder: Path, **values: Any) -> StreamConfig:
    fixed = {"max_source_bytes": 6000, "probe_bytes": 600, "max_document_bytes": 5000, "transition": 1500}
    return StreamConfig(path=str(folder), **{**fixed, **values})


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Corpus:
    return open_corpus(config(folder))


BYTES = ByteTokenizer()
PAIRS = BPETokenizer.train([words(i, 50) for i in range(20)], 400)


def test_without_a_limit_a_source_of_ones_own_is_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("\n\n".join(words(i, 200) for i in range(400)))
    corpus = open_corpus(StreamConfig(path=str(tmp_path)))
    read = sum(s.bytes for s in Stream(corpus, BYTES, StreamConfig(path=str(tmp_path)), CONTEXT, ["long"], 0))
    size = sum(len(document.text.encode()) for _, document in corpus.documents("long"))
    assert size > 2 * SHIPPED_SOURCE_BYTES and size - CONTEXT <= read <= size * 1.01, "documents end with a token"


def same(left: List[Sequence], right: List[Sequence]) -> bool:
    def plain(s: Sequence) -> Tuple[Any, ...]:
        return (s.key, s.source, s.tokens.tolist(), s.tokens.dtype, s.document, s.offset, s.subject, s.bytes)

    return [plain(s) for s in left] == [plain(s) for s in right]


@given(
    schedule=st.sampled_from(["sequential", "mixed", "soft"]),
    tokenizer=st.sampled_from([BYTES, PAIRS]),
    limit=st.sampled_from([0, 3000, 6000]),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    rest=st.integers(1, 9),
    seed=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_cursor_yields_the_identical_rest(
    folder: Path, schedule: str, tokenizer: Tokenizer, limit: int, sizes: List[int], rest: int, seed: int
) -> None:
    cfg = config(folder, schedule=schedule, max_source_bytes=limit)
    corpus = open_corpus(cfg)
    whole = list(Stream(corpus, tokenizer, cfg, CONTEXT, NAMES, seed))
    cursor, taken = Cursor(), 0
    for size in sizes:
        stream = Stream(corpus, tokenizer, cfg, CONTEXT, NAMES, seed, cursor)
        batch = stream.next_batch(size)
        assert len(batch) == (size if taken + size <= len(whole) else 0)
        taken += len(batch)
        cursor = Cursor.from_json(json.loads(json.dumps(stream.cursor.to_json())))
        assert cursor == stream.cursor and cursor.key == taken
    stream = Stream(corpus, tokenizer, cfg, CONTEXT, NAMES, seed, cursor)
    batches = list(iter(lambda: stream.next_batch(rest), []))
    found = list(chain.from_iterable(batches))
    assert all(len(batch) == rest for batch in batches)
    assert len(found) == (len(whole) - taken) // rest * rest
    assert same(found, whole[taken : taken + len(found)])
    # What did not fill a batch is still there, for whoever asks for less.
    assert same(found + list(stream), whole[taken:])


@pytest.mark.parametrize("tokenizer", [BYTES, PAIRS], ids=["byte", "bpe"])
@pytest.mark.parametrize("schedule", ["sequential", "mixed", "soft"])
def test_every_token_but_the_first_is_predicted_once(folder: Path, tokenizer: Tokenizer, schedule: str) -> None:
    cfg = config(folder, max_source_bytes=0, schedule=schedule)
    corpus = open_corpus(cfg)
    found = list(Stream(corpus, tokenizer, cfg, CONTEXT, NAMES, 0))
    assert [s.key for s in found] == list(range(len(found)))
    for name in NAMES:
        texts = {index: tokenizer.encode(document.text) for index, document in corpus.documents(name)}
        packed = np.concatenate([np.append(tokens, tokenizer.eos) for tokens in texts.values()])
        mine = [s for s in found if s.source == name]
        assert len(mine) == (len(packed) - 1) // CONTEXT
        for number, sequence in enumerate(mine):
            assert sequence.tokens.dtype == tokenizer.dtype
            assert sequence.tokens.tolist() == packed[number * CONTEXT : (number + 1) * CONTEXT + 1].tolist()
            assert sequence.bytes == tokenizer.byte_lengths[sequence.tokens[1:]].sum()
            assert np.append(texts[sequence.document], tokenizer.eos)[sequence.offset] == sequence.tokens[0]


def test_limits_are_kept_to_the_byte(corpus: Corpus, folder: Path) -> None:
    for tokenizer in (BYTES, PAIRS):
        cfg = config(folder, max_source_bytes=3200)
        taken: Dict[str, int] = dict.fromkeys(NAMES, 0)
        for sequence in Stream(corpus, tokenizer, cfg, CONTEXT, NAMES, 0):
            taken[sequence.source] += sequence.bytes
        assert max(taken.values()) <= 3200
        # The next sequence would have gone over.
        assert taken["a"] > 3200 - 8 * CONTEXT
    exact = [s.bytes for s in Stream(corpus, BYTES, config(folder, max_source_bytes=3200), CONTEXT, ["a"], 0)]
    assert exact == [CONTEXT] * 100


def test_subjects_of_all_documents_touched(corpus: Corpus, folder: Path) -> None:
    subjects = {index: document.subject for index, document in corpus.documents("b")}
    found = list(Stream(corpus, BYTES, config(folder, max_source_bytes=0), CONTEXT, ["b", "a"], 0))
    for sequence in found:
        if sequence.source == "a":
            assert sequence.subject is None
        else:
            assert subjects[sequence.document] in (sequence.subject or "").split("\n")
    assert any("\n" in (s.subject or "") for s in found)


def test_sequential_is_one_after_the_other(corpus: Corpus, folder: Path) -> None:
    order = ["c", "a", "d", "b"]
    found = [s.source for s in Stream(corpus, BYTES, config(folder), CONTEXT, order, 0)]
    assert [name for name, _ in groupby(found)] == order


def test_mixed_mixes_evenly_and_by_seed(corpus: Corpus, folder: Path) -> None:
    cfg = config(folder, schedule="mixed")
    one, other = ([s.source for s in Stream(corpus, BYTES, cfg, CONTEXT, ["a", "d"], seed)] for seed in (0, 1))
    assert one != other
    assert sorted(one) == sorted(other)
    half = one[: len(one) // 2]
    assert abs(half.count("a") - one.count("a") / 2) < 4 * (len(half) ** 0.5) / 2


def test_soft_moves_over_linearly() -> None:
    totals, alive, width = [1000.0, 1000.0, 1000.0], [True] * 3, 400.0
    early, middle, late = (
        np.mean([soft(key, seed, totals, alive, width) == 1 for seed in range(400)]) for key in (900, 1000, 1100)
    )
    assert [early, middle, late] == pytest.approx([0.25, 0.5, 0.75], abs=0.08)
    assert {soft(key, 7, totals, alive, width) for key in range(0, 800)} == {0}
    assert {soft(key, 7, totals, [False, True, True], width) for key in range(1200, 1800)} == {1}
    # What is left of the first comes as soon as its transition is over, and what is used up is skipped.
    assert {soft(key, 7, totals, alive, width) for key in range(1200, 1800)} == {0}
    assert {soft(key, 7, totals, [False, True, True], width) for key in range(0, 800)} == {1}


def test_soft_keeps_the_order_of_sources(corpus: Corpus, folder: Path) -> None:
    found = [s.source for s in Stream(corpus, BYTES, config(folder, schedule="soft"), CONTEXT, NAMES, 0)]
    hard = [s.source for s in Stream(corpus, BYTES, config(folder), CONTEXT, NAMES, 0)]
    assert sorted(found) == sorted(hard) and found != hard
    places = [np.mean([i for i, name in enumerate(found) if name == wanted]) for wanted in NAMES]
    assert places == sorted(places)
    assert len(list(groupby(found))) > 8
    assert set(found[-5:]) == {"d"}


def test_draws_are_uniform_and_skip_what_is_used_up() -> None:
    draws = [uniform(3, key) for key in range(4000)]
    assert min(draws) >= 0 and max(draws) < 1
    assert np.histogram(draws, bins=10, range=(0, 1))[0].min() > 320
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.05
    picks = [mixed(key, 3, [30.0, 10.0, 60.0], [True, False, True], 0.0) for key in range(2000)]
    assert picks.count(1) == 0
    assert picks.count(0) / 2000 == pytest.approx(1 / 3, abs=0.04)


def test_estimate_is_close(corpus: Corpus, folder: Path) -> None:
    for tokenizer in (BYTES, PAIRS):
        stream = Stream(corpus, tokenizer, config(folder), CONTEXT, ["a", "d"], 0)
        assert stream.estimate_tokens() == pytest.approx(sum(CONTEXT for _ in stream), rel=0.1)


def test_cursors_are_checked(corpus: Corpus, folder: Path) -> None:
    for bad in ({}, {"key": 1, "positions": {"a": [1, 2]}}, {"key": "x", "positions": {"a": 3}}):
        with pytest.raises(ValueError, match="not a stream cursor"):
            Cursor.from_json(bad)
    with pytest.raises(ValueError, match="the cursor names 'z'"):
        Stream(corpus, BYTES, config(folder), CONTEXT, NAMES, 0, Cursor(1, {"z": (1, 0, 32, 32)}))
    gone = Cursor(1, {"d": (1, 999 << 40, 5, 32)})
    with pytest.raises(ValueError, match=r"'d': document .* is not there any more"):
        Stream(corpus, BYTES, config(folder), CONTEXT, ["d"], 0, gone).next_batch(1)


def test_a_batch_of_nothing_is_refused(corpus: Corpus, folder: Path) -> None:
    with pytest.raises(ValueError, match="n must be at least 1"):
        Stream(corpus, BYTES, config(folder), CONTEXT, NAMES, 0).next_batch(0)
    with pytest.raises(ValueError, match="names 'a' twice"):
        Stream(corpus, BYTES, config(folder), CONTEXT, ["a", "a"], 0)


def test_probes_are_held_out_and_of_the_size_asked_for(corpus: Corpus, folder: Path) -> None:
    cfg = config(folder)
    for tokenizer in (BYTES, PAIRS):
        probes = build_probes(corpus, tokenizer, cfg, CONTEXT, NAMES)
        for name, probe in probes.items():
            assert probe.tokens.shape[1] == CONTEXT + 1 and probe.tokens.dtype == tokenizer.dtype
            assert probe.bytes == tokenizer.byte_lengths[probe.tokens[:, 1:]].sum()
            assert 0.5 * cfg.probe_bytes < probe.bytes < 1.5 * cfg.probe_bytes
            again = build_probes(corpus, tokenizer, cfg, CONTEXT, [name])[name]
            assert np.array_equal(again.tokens, probe.tokens)
    everything = replace(cfg, max_source_bytes=0)
    trained = {s.tokens.tobytes() for s in Stream(corpus, BYTES, everything, CONTEXT, NAMES, 0)}
    rows = [row for probe in build_probes(corpus, BYTES, cfg, CONTEXT, NAMES).values() for row in probe.tokens]
    assert not trained & {row.tobytes() for row in rows}


def test_too_little_held_out_text(corpus: Corpus, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"source 'b': its held-out text has \d+ tokens, but one sequence needs 20001"):
        build_probes(corpus, BYTES, config(folder), 20_000, ["b"])


def named(tmp_path: Path, names: str) -> Tuple[Corpus, StreamConfig]:
    for name in names:
        (tmp_path / f"{name}.txt").write_text("\n\n".join(words(i, 40) for i in range(30)))
    cfg = StreamConfig(path=str(tmp_path))
    return open_corpus(cfg), cfg


def test_selection_from_own_data(tmp_path: Path) -> None:
    corpus, cfg = named(tmp_path, "abcde")
    explicit = replace(cfg, sources=["e", "c", "a"])
    base = BaseConfig()
    assert select_sources(corpus, cfg, base) == (["a", "b"], ["c", "d", "e"])
    assert select_sources(corpus, explicit, base) == (["e", "c"], ["e", "c", "a"])
    assert select_sources(corpus, cfg, replace(base, sources=["d"])) == (["d"], ["a", "b", "c", "e"])
    assert select_sources(corpus, explicit, replace(base, sources=["a"])) == (["a"], ["e", "c", "a"])
    assert select_sources(corpus, cfg, replace(base, checkpoint="r")) == ([], ["a", "b", "c", "d", "e"])
    assert select_sources(corpus, cfg, replace(base, tokens=0)) == ([], ["a", "b", "c", "d", "e"])
    assert select_sources(corpus, cfg, replace(base, checkpoint="r", sources=["b"])) == (["b"], ["a", "c", "d", "e"])
    with pytest.raises(ValueError, match=r"base.sources names 'f'"):
        select_sources(corpus, cfg, replace(base, sources=["f"]))
    with pytest.raises(ValueError, match="no source is left for the stream"):
        select_sources(corpus, cfg, replace(base, sources=["a", "b", "c", "d", "e"]))


def test_selection_with_few_sources(tmp_path: Path) -> None:
    corpus, cfg = named(tmp_path, "ab")
    assert select_sources(corpus, cfg, BaseConfig()) == (["a"], ["a", "b"])


def test_selection_from_the_installation() -> None:
    cfg = StreamConfig(max_source_bytes=1000)
    corpus = open_corpus(cfg)
    base, stream = select_sources(corpus, cfg, BaseConfig())
    assert base == ["docs", "python"] and stream == ["cpp", "unicode", "javascript", "fonts"]
    assert select_sources(corpus, replace(cfg, sources=["fonts"]), BaseConfig()) == (["docs", "python"], ["fonts"])
