"""Files into sources: names, held-out text, seeking, quarantine, and errors that say what to do."""

from __future__ import annotations

import json
import random
import re
import tracemalloc
from pathlib import Path
from typing import Any, Dict, List

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config.schema import StreamConfig
from pipelines.data.corpus import Corpus, open_corpus


def prose(seed: int, size: int, paragraph: int = 300) -> str:
    """Distinct paragraphs, about `size` bytes together."""
    rng = random.Random(seed)
    words = ["tide", "ember", "slate", "öl", "drift", "hollow", "quartz", "murmur"]
    pieces, length, line = [], 0, 0
    while length < size:
        piece = f"{rng.choice(words)}{rng.randrange(10_000)} "
        line += len(piece)
        if line >= paragraph:
            piece, line = piece + "\n\n", 0
        pieces.append(piece)
        length += len(piece.encode())
    return "".join(pieces) + "\n\n"


def config(path: Path, **values: Any) -> StreamConfig:
    return StreamConfig(path=str(path), **{"probe_bytes": 4096, **values})


def training(corpus: Corpus, source: str) -> List[str]:
    return [document.text for _, document in corpus.documents(source)]


def held_out(corpus: Corpus, source: str) -> List[str]:
    return [document.text for document in corpus.probe_documents(source)]


def check_seekable(corpus: Corpus, source: str) -> None:
    found = list(corpus.documents(source))
    indices = [index for index, _ in found]
    assert indices == sorted(set(indices))
    for number in {0, 1, len(found) // 2, len(found) - 1} & set(range(len(found))):
        assert list(corpus.documents(source, indices[number])) == found[number:]


def test_files_folders_and_their_held_out_files(tmp_path: Path) -> None:
    (tmp_path / "news.txt").write_text(prose(1, 60_000))
    (tmp_path / "notes.md").write_text(prose(2, 60_000))
    for name, seed in (("train", 3), ("valid", 4), ("testimony", 5)):
        (tmp_path / "law").mkdir(exist_ok=True)
        (tmp_path / "law" / f"{name}.txt").write_text(prose(seed, 20_000))
    corpus = open_corpus(config(tmp_path))
    assert corpus.sources == ("law", "news", "notes")
    assert "".join(held_out(corpus, "law")) == prose(4, 20_000)
    assert "".join(training(corpus, "law")) == prose(3, 20_000) + prose(5, 20_000)
    for source in corpus.sources:
        check_seekable(corpus, source)


@pytest.mark.parametrize("size", [3_000, 60_000, 2_500_000])
def test_one_file_gives_up_some_documents_once_and_for_all(tmp_path: Path, size: int) -> None:
    text = prose(7, size)
    (tmp_path / "a.txt").write_text(text)
    corpus = open_corpus(config(tmp_path))
    train, probe = training(corpus, "a"), held_out(corpus, "a")
    assert sorted(train + probe) == sorted(set(train + probe))
    assert len("".join(train + probe).encode()) == len(text.encode())
    assert set(train + probe) <= {piece for piece in train + probe if piece in text}
    held = len("".join(probe).encode())
    assert min(4096, size // 5) <= held <= max(3 * 4096, size // 3)
    assert held_out(open_corpus(config(tmp_path)), "a") == probe
    check_seekable(corpus, "a")


def test_moving_the_data_moves_no_document(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        for number in range(30):
            path = tmp_path / folder / "s" / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(prose(number, 2_000))
    here, there = (open_corpus(config(tmp_path / folder)) for folder in ("here", "there"))
    assert held_out(here, "s") == held_out(there, "s")
    # Whole files: no held-out text stands in a file that is trained on.
    probed = {document.origin.split("#")[0] for document in here.probe_documents("s")}
    trained = {document.origin.split("#")[0] for _, document in here.documents("s")}
    assert len(probed) + len(trained) == 30
    assert not probed & trained
    assert 2 <= len(probed) <= 4


def test_jsonl_rows_go_to_their_sources(tmp_path: Path) -> None:
    rows: List[Dict[str, Any]] = [
        {"text": f"row {i} " + prose(i, 200), "source": "ab"[i % 2], "subject": f"p{i % 5}"} for i in range(400)
    ]
    rows += [{"text": f"plain {i} " + prose(i, 200)} for i in range(100)] + [{"text": None}, {"text": " "}]
    (tmp_path / "mix.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    corpus = open_corpus(config(tmp_path))
    assert corpus.sources == ("a", "b", "mix")
    for source, prefix in (("a", "row"), ("b", "row"), ("mix", "plain")):
        texts = training(corpus, source) + held_out(corpus, source)
        expected = [r["text"] for r in rows if r.get("source", "mix") == source and (r["text"] or "").strip()]
        assert sorted(texts) == sorted(expected)
        assert all(text.startswith(prefix) for text in texts)
        assert held_out(corpus, source)
        check_seekable(corpus, source)
    assert {document.subject for _, document in corpus.documents("a")} == {f"p{i}" for i in range(5)}
    assert {document.subject for _, document in corpus.documents("mix")} == {None}


@pytest.mark.parametrize("with_source", [True, False])
def test_parquet_by_row_groups(tmp_path: Path, with_source: bool) -> None:
    texts = [f"row {i} " + prose(i, 150) for i in range(1000)]
    columns: Dict[str, Any] = {"text": pa.array([*texts, None, ""]).dictionary_encode(), "other": [1.0] * 1002}
    if with_source:
        columns["source"] = [["x", "y", None][i % 3] for i in range(1002)]
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=130)
    corpus = open_corpus(config(tmp_path))
    assert corpus.sources == (("t", "x", "y") if with_source else ("t",))
    found = [text for source in corpus.sources for text in training(corpus, source) + held_out(corpus, source)]
    assert sorted(found) == sorted(texts)
    for source in corpus.sources:
        assert held_out(corpus, source)
        check_seekable(corpus, source)


def test_globs_take_code_and_name_like_directories(tmp_path: Path) -> None:
    for name in ("one.py", "two.py", "deep/three.py", "deep/er/four.py", "skip.c"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(prose(len(name), 9_000))
    assert open_corpus(config(tmp_path / "**" / "*.py")).sources == ("deep", "one", "two")
    assert open_corpus(config(tmp_path / "one.py")).sources == ("one",)


def test_a_huge_line_is_quarantined_and_never_held(tmp_path: Path) -> None:
    before, after = prose(1, 30_000), prose(2, 30_000)
    with (tmp_path / "a.txt").open("w") as file:
        file.write(before)
        for _ in range(12):
            file.write("x" * (1 << 20))
        file.write("\n" + after)
    with (tmp_path / "b.jsonl").open("w") as file:
        file.write(json.dumps({"text": "y" * 12_000_000}) + "\n" + json.dumps({"text": "z" * 150_000}) + "\n")
        file.writelines(json.dumps({"text": prose(i, 500)}) + "\n" for i in range(50))
    tracemalloc.start()
    corpus = open_corpus(config(tmp_path, max_document_bytes=100_000))
    for _ in range(2):
        texts = training(corpus, "a") + held_out(corpus, "a")
        rows = training(corpus, "b") + held_out(corpus, "b")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000
    assert sum(map(len, texts)) == len(before + after) and not any("xx" in text for text in texts)
    assert sorted(rows) == sorted(prose(i, 500) for i in range(50))
    left_out = {Path(item.origin.split("#")[0]).name + f":{item.size}" for item in corpus.quarantined}
    assert left_out == {f"a.txt:{12 * (1 << 20) + 1}", "b.jsonl:12000013", "b.jsonl:150000"}
    assert all("stream.max_document_bytes=100000" in item.reason for item in corpus.quarantined)
    check_seekable(corpus, "a")
    check_seekable(corpus, "b")


def test_long_parquet_rows_and_half_characters_are_quarantined_while_reading(tmp_path: Path) -> None:
    texts = [prose(i, 300) for i in range(60)]
    pq.write_table(pa.table({"text": [*texts, "w" * 90_000]}), tmp_path / "p.parquet")
    lines = [json.dumps({"text": text}) for text in texts] + ['{"text": "half \\ud83d"}']
    (tmp_path / "j.jsonl").write_text("\n".join(lines))
    corpus = open_corpus(config(tmp_path, max_document_bytes=50_000))
    for source in corpus.sources:
        assert sorted(training(corpus, source) + held_out(corpus, source)) == sorted(texts)
    reasons = {Path(item.origin).name.split("#")[0]: item.reason for item in corpus.quarantined}
    assert set(reasons) == {"p.parquet", "j.jsonl"}
    assert "surrogate" in reasons["j.jsonl"]


def test_text_without_blank_lines_or_line_ends_still_splits(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("".join(f"line number {i}\n" for i in range(20_000)))
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbf" + prose(3, 200_000).replace("\n", "\r\n").encode())
    corpus = open_corpus(config(tmp_path))
    for source in corpus.sources:
        texts = training(corpus, source)
        assert len(texts) >= 8
        assert max(len(text.encode()) for text in texts) <= 2 * 8192 + 400
        check_seekable(corpus, source)
    assert all(text.endswith("\r\n\r\n") for text in training(corpus, "dos"))
    assert not any("\ufeff" in text for text in training(corpus, "dos") + held_out(corpus, "dos"))


def fails(path: Path, message: str, **values: Any) -> None:
    with pytest.raises(ValueError, match=message):
        open_corpus(config(path, **values))


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    fails(tmp_path / "absent", r"stream.path='.*absent' does not exist")
    fails(tmp_path / "*.txt", r"matches no file")
    (tmp_path / "a.pdf").write_text("x")
    fails(tmp_path, r"holds no .txt, .md, .jsonl, .parquet file")
    (tmp_path / "a.txt").write_text(" \n\n ")
    fails(tmp_path, r"source 'a' has no usable document \(.*a.txt: 4 bytes\)")
    (tmp_path / "a.txt").write_text("q" * 3000)
    fails(tmp_path, r"a.txt#0 was quarantined: 3000 bytes are more than", max_document_bytes=1000)


@pytest.mark.parametrize("place", [0, 40, 1_048_575, 1_048_576, 1_500_000])
def test_bad_bytes_are_named_with_their_offset(tmp_path: Path, place: int) -> None:
    data = bytearray((prose(1, 2_000_000) if place else "").encode("ascii", "replace") or b"abc")
    data[place] = 0xFF
    (tmp_path / "bad.txt").write_bytes(bytes(data))
    fails(tmp_path, rf"bad.txt: the bytes at offset {place} are not UTF-8; re-encode as UTF-8")
    # Inside a line that is too long to be held, too.
    (tmp_path / "bad.txt").write_bytes(bytes(data).replace(b"\n", b" "))
    fails(tmp_path, rf"bad.txt: the bytes at offset {place} are not UTF-8", max_document_bytes=5000)


def test_broken_json_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": prose(i, 100)}) for i in range(200)]
    for bad, message in [
        ('{"text": ', r"a.jsonl:8: not JSON"),
        ("[1]", r"a.jsonl:8: list instead of an object"),
        ('{"body": "x", "id": 1}', r"a.jsonl:8: no key 'text' \(stream.text_field\); the keys here are: body, id"),
        ('{"text": 5}', r"a.jsonl:8: 'text' holds int instead of a string"),
    ]:
        path.write_text("\n".join([*good[:7], bad, *good[7:]]))
        fails(path, message)
    path.write_bytes("\n".join(good[:3]).encode() + b'\n{"text": "\xff"}\n')
    offset = len("\n".join(good[:3])) + 11 + sum(text.count("ö") for text in good[:3])
    fails(path, rf"a.jsonl:4: the bytes at offset {offset} are not UTF-8")
    # Beyond the lines parsed at the start the error comes while reading.
    path.write_text("\n".join([*good[:150], '{"text": ', *good[150:]]))
    corpus = open_corpus(config(path))
    with pytest.raises(ValueError, match=r"a.jsonl:151: not JSON"):
        training(corpus, "a")


def test_parquet_without_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), path)
    fails(path, r"a.parquet: no column 'text' \(stream.text_field\); the columns are: body, id")
    fails(path, r"column 'id' \(stream.text_field\) holds int64; it must hold strings", text_field="id")
    path.write_bytes(b"PAR1 nothing")
    fails(path, r"a.parquet: not a Parquet file")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    fails(path, r"source 'a' has no usable document")


def test_undecodable_parquet_text_is_named_with_its_row(tmp_path: Path) -> None:
    good = [prose(i, 100).encode() for i in range(300)]
    data = pa.array([*good[:270], b"ab\xff", *good[270:]], pa.binary())
    pq.write_table(
        pa.table({"text": pa.Array.from_buffers(pa.string(), len(data), data.buffers())}), tmp_path / "a.parquet"
    )
    corpus = open_corpus(config(tmp_path))
    with pytest.raises(ValueError, match=r"a.parquet: row 270, column 'text': the bytes at offset 2 are not UTF-8"):
        training(corpus, "a") + held_out(corpus, "a")


def test_unknown_source_names_come_with_a_suggestion(tmp_path: Path) -> None:
    for name in ("physics", "law"):
        (tmp_path / f"{name}.txt").write_text(prose(1, 20_000))
    fails(tmp_path, "stream.sources names 'phisics'.*did you mean 'physics'", sources=["phisics"])
    corpus = open_corpus(config(tmp_path))
    with pytest.raises(ValueError, match=re.escape("among the sources found: law, physics")):
        next(corpus.documents("chemistry"))


def test_a_source_of_one_document_cannot_be_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one line only\n")
    corpus = open_corpus(config(tmp_path))
    assert (training(corpus, "a"), held_out(corpus, "a")) == (["one line only\n"], [])
