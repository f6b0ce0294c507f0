"""Rows that are valid but odd, and files that are damaged: quarantined, or an error that names file and place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Dict, List

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config.schema import StreamConfig
from pipelines.data.corpus import Corpus, open_corpus

TEXTS = [f"A document about lamps and rivers, number {i}. " * 12 for i in range(200)]
DEEP = "[" * 100_000 + "]" * 100_000


def lines(count: int, **more: Any) -> str:
    return "".join(json.dumps({"text": text, **more}) + "\n" for text in TEXTS[:count])


def opened(path: Path) -> Corpus:
    return open_corpus(StreamConfig(path=str(path), probe_bytes=1024))


def texts(corpus: Corpus, source: str) -> List[str]:
    found = [document.text for _, document in corpus.documents(source)]
    return sorted(found + [document.text for document in corpus.probe_documents(source)])


@pytest.mark.parametrize("before", [10, 150])
@pytest.mark.parametrize("row", ['{"text": "x", "m": %s}', '{"text": %s}', "%s", '{"m": %s, "source": "other"}'])
def test_a_line_nested_without_end_is_quarantined(tmp_path: Path, before: int, row: str) -> None:
    """Whether it is among the lines that are parsed at once or found while reading."""
    (tmp_path / "a.jsonl").write_text(lines(before) + row % DEEP + "\n" + lines(before))
    corpus = opened(tmp_path)
    assert texts(corpus, "a") == sorted(2 * TEXTS[:before])
    (item,) = corpus.quarantined
    assert item.origin == f"{tmp_path / 'a.jsonl'}#{len(lines(before))}" and "nested too deeply" in item.reason


@pytest.mark.parametrize("key", ["n", "subject", "source"])
def test_numbers_of_thousands_of_digits_are_read_over(tmp_path: Path, key: str) -> None:
    big = f'{{"text": "a text of its own", "{key}": {"9" * 5000}}}\n'
    (tmp_path / "a.jsonl").write_text(lines(20) + big + lines(20, source=7))
    corpus = opened(tmp_path)
    other = {"source": "inf"}.get(key, "a")
    assert "a text of its own" in texts(corpus, other) if other == "a" else other in corpus.sources
    assert "7" in corpus.sources and not corpus.quarantined


def test_a_number_where_text_should_be_is_an_error_however_long(tmp_path: Path) -> None:
    for digits, kind in (("9" * 5000, "float"), ("9", "int")):
        (tmp_path / "a.jsonl").write_text(lines(3) + f'{{"text": {digits}}}\n')
        with pytest.raises(ValueError, match=rf"a\.jsonl:4: 'text' holds {kind} instead of a string"):
            opened(tmp_path)


@pytest.mark.parametrize("name", ["text", "source", "subject"])
def test_columns_of_one_name_are_an_error(tmp_path: Path, name: str) -> None:
    names = {"text": ["text", "text"]}.get(name, ["text", name, name])
    pq.write_table(pa.Table.from_arrays([pa.array(TEXTS)] * len(names), names=names), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=rf"p\.parquet: 2 columns are called '{name}'; rename all but one"):
        opened(tmp_path)


def test_columns_of_one_name_that_nobody_reads_are_none_of_our_business(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(TEXTS)] * 3, names=["text", "m", "m"])
    pq.write_table(table, tmp_path / "p.parquet")
    assert texts(opened(tmp_path), "p") == sorted(TEXTS)


def test_damage_found_while_reading_names_file_and_row(tmp_path: Path) -> None:
    """The first row group is whole, so that the damage shows only once the run is there."""
    path = tmp_path / "p.parquet"
    rows = [text + str(i) for i, text in enumerate(TEXTS * 10)]
    pq.write_table(pa.table({"text": rows}), path, row_group_size=500)
    at = pq.ParquetFile(path).metadata.row_group(1).column(0).file_offset or 0
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset or at
    content = bytearray(path.read_bytes())
    content[start + 40 : start + 3000] = b"\xaa" * 2960
    path.write_bytes(content)
    corpus = opened(tmp_path)
    seen: Dict[str, int] = {"rows": 0}
    with pytest.raises(ValueError, match=re.escape(f"{path}: damaged at row 500 or soon after (")):
        for _ in corpus.documents("p"):
            seen["rows"] += 1
    assert seen["rows"] > 400


@pytest.mark.parametrize("kept", [0.2, 0.95])
def test_a_parquet_file_that_was_cut_off_is_named(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"text": TEXTS, "source": ["s"] * len(TEXTS)}), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: "):
        opened(tmp_path)
