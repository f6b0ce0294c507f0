"""What is said about a run's data: it must add up to what the stream and the base really read."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest

from pipelines.config.schema import BaseConfig, Config
from pipelines.data.facts import BASE_LIMIT, NOT_NAMED, STREAM_LIMIT, DataFacts, data_facts
from pipelines.data.module import open_data
from pipelines.sleep.base import base_sequences

TEXT = "".join(f"Line {i} of a text about rivers, lamps and stones, number {i * i}.\n\n" for i in range(60))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("aa", "bb", "cc", "dd"):
        (tmp_path / f"{name}.txt").write_text(TEXT)
    return tmp_path


def told(
    make_config: Callable[..., Config], folder: Path, base: Dict[str, Any] | None = None, **stream: Any
) -> DataFacts:
    cfg = make_config()
    section = replace(cfg.stream, **{"path": str(folder), "sources": [], "max_source_bytes": 0, **stream})
    return data_facts(open_data(replace(cfg, stream=section, base=BaseConfig(tokens=512, batch=2, **(base or {})))))


@pytest.mark.parametrize("limits", [(0, 0), (1600, 0), (1600, 2400), (0, 2400)])
def test_what_is_said_to_be_read_is_read(
    make_config: Callable[..., Config], folder: Path, limits: tuple[int, int]
) -> None:
    base = {"sources": ["aa"], "max_source_bytes": limits[1]}
    facts = told(make_config, folder, base, sources=["bb", "cc"], max_source_bytes=limits[0])
    cfg = make_config()
    stream = replace(cfg.stream, path=str(folder), sources=["bb", "cc"], max_source_bytes=limits[0])
    cfg = replace(cfg, stream=stream, base=BaseConfig(tokens=512, batch=2, **base))
    setting = open_data(cfg)
    read: Dict[str, int] = {}
    for sequence in [*setting.stream(), *base_sequences(setting.corpus, setting.tokenizer, cfg, ["aa"])]:
        read[sequence.source] = read.get(sequence.source, 0) + sequence.bytes
    by_name = {source.name: source for source in facts.sources}
    assert list(by_name) == ["aa", "bb", "cc", "dd"]
    for name, source in by_name.items():
        assert source.size == len(TEXT.encode()) and source.held_size >= 200 and source.held_documents >= 1
        held = sum(len(document.text.encode()) for document in setting.corpus.probe_documents(name))
        assert held == source.held_size
        assert source.documents == source.held_documents + len(list(setting.corpus.documents(name)))
        # A sequence is 16 tokens, and every document ends with one that counts a byte.
        assert abs(source.base + source.stream - read.get(name, 0)) <= 16 + source.documents
    assert by_name["aa"].why == (BASE_LIMIT if limits[1] else STREAM_LIMIT if limits[0] else "")
    assert by_name["bb"].why == (STREAM_LIMIT if limits[0] else "") and by_name["dd"].why == NOT_NAMED
    said = "\n".join(facts.notes)
    assert ("stream.max_source_bytes=1600" in said) == bool(limits[0])
    assert ("stream.max_source_bytes=0: no limit" in said) == (not limits[0])
    assert ("base.max_source_bytes=2400" in said) == bool(limits[1])
    assert "base.sources is not given" not in said


def test_sources_that_became_the_base_by_default_are_named(make_config: Callable[..., Config], folder: Path) -> None:
    (note,) = [note for note in told(make_config, folder).notes if "base.sources" in note]
    assert "the first 2 sources are pretrained on as the base (aa, bb); base.sources=[...]" in note
    (note,) = [note for note in told(make_config, folder, sources=["cc"]).notes if note.startswith("base.sources")]
    assert "the first source is pretrained on as the base (cc), and streamed as well" in note


def test_a_checkpoint_without_sources_is_said_to_be_forgotten(make_config: Callable[..., Config], folder: Path) -> None:
    notes = told(make_config, folder, {"checkpoint": "somewhere"}).notes
    assert [note for note in notes if "nothing of what the checkpoint knows can be replayed" in note]
    notes = told(make_config, folder, {"checkpoint": "somewhere", "sources": ["aa"]}).notes
    assert not [note for note in notes if "checkpoint" in note]


def test_what_is_left_out_is_counted_in_a_line_per_kind(make_config: Callable[..., Config], folder: Path) -> None:
    for number in range(3):
        with gzip.open(folder / f"part{number}.gz", "wt") as file:
            file.write(TEXT)
    rows: List[Dict[str, str]] = [{"text": "word " * 20} for _ in range(30)] + [{"text": "x" * 9000}] * 2
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = told(make_config, folder, max_document_bytes=8000).left_out
    assert [line for line in lines if line.startswith("not read: .gz, 3 (part0.gz, ...): compressed files")]
    (line,) = [line for line in lines if line.startswith("quarantined of rows: 2 documents, 18,000 bytes; ")]
    assert "rows.jsonl#" in line and "stream.max_document_bytes=8000" in line
    assert len(lines) == 2


def test_the_facts_cost_no_second_look_at_the_files(make_config: Callable[..., Config], folder: Path) -> None:
    stream = replace(make_config().stream, path=str(folder), sources=[])
    setting = open_data(replace(make_config(), stream=stream, base=BaseConfig(sources=["aa"])))
    for path in folder.iterdir():
        path.unlink()
    assert [source.size for source in data_facts(setting).sources] == [len(TEXT.encode())] * 4


def test_shipped_text_is_counted_as_far_as_it_was_looked_at(make_config: Callable[..., Config]) -> None:
    cfg = make_config()
    stream = replace(cfg.stream, path=None, sources=["fonts"], max_source_bytes=4096)
    facts = data_facts(open_data(replace(cfg, stream=stream, base=BaseConfig(sources=["docs"]))))
    assert [(source.name, source.base, source.stream) for source in facts.sources[:2]] == [
        ("docs", 4096, 0),
        ("fonts", 0, 4096),
    ]
    assert all(source.more and source.size > 4096 for source in facts.sources[:2])
