"""Dreams for people: the round's record, the summary, the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict

import numpy as np
import pytest

from pipelines.data.tokens import ByteTokenizer
from pipelines.dreams.dream import Dream, Night
from pipelines.dreams.report import SHOWN, dream_section, dream_summary, night_record
from pipelines.experience import ExperienceStore, Record, Snapshot
from pipelines.report.page import write_report
from tests.unit.pipelines.report.test_report import make_summary

TEXT = "the quiet lantern <b>burns</b>"


@pytest.fixture
def record(tmp_path: Path) -> Dict[str, Any]:
    """What a round with six dreams, two of them with a reward, leaves in its record."""
    tokens = ByteTokenizer().encode(TEXT).astype(np.int64)
    with ExperienceStore.open(tmp_path / "store", len(tokens) - 1, "uint16") as store:
        store.append([Record(key=k, source=f"source{k}", tokens=tokens) for k in range(3)])
        store.commit()
    dreams = [Dream(tokens, (2, 0), 9, "blocks.1.fast", 2.25, 0.5, 0.125 if n < 2 else None) for n in range(6)]
    night = Night(dreams, 10, {"copied": 3, "noise": 1}, 100.0, 0.5)
    return night_record(night, Snapshot.open(tmp_path / "store"), 7, ByteTokenizer().decode)


def test_a_record_holds_counts_and_a_few_texts(record: Dict[str, Any]) -> None:
    assert json.loads(json.dumps(record)) == record
    assert (record["generated"], record["kept"], record["stored"]) == (10, 6, 13)
    assert len(record["samples"]) == SHOWN
    first = record["samples"][0]
    assert first["prompt"] == TEXT[:9] and first["text"] == TEXT[9:]
    assert first["parents"] == [{"key": 2, "source": "source2"}, {"key": 0, "source": "source0"}]


def test_the_summary_adds_the_rounds_up(record: Dict[str, Any]) -> None:
    rounds = [{"id": 1, "dreams": record}, {"id": 2}, {"id": 3, "dreams": {**record, "rejected": {"copied": 2}}}]
    summary = dream_summary(rounds)
    assert summary is not None
    assert summary["generated"] == 20 and summary["kept"] == 12 and summary["rejected"] == {"copied": 5, "noise": 1}
    assert [sample["round"] for sample in summary["samples"]] == [1] * SHOWN + [3] * SHOWN
    assert dream_summary([{"id": 1}]) is None and dream_section({}) is None and dream_section({"dreams": None}) is None


def test_the_page_shows_dreams_escaped(record: Dict[str, Any], tmp_path: Path) -> None:
    dreams = dream_summary([{"id": number, "dreams": record} for number in range(1, 9)])
    (tmp_path / "summary.json").write_text(json.dumps({**make_summary(), "dreams": dreams}))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<h2>Dreams</h2>" in page and "sorted out: copied" in page and "source2 2, source0 0" in page
    assert page.count("&lt;b&gt;burns&lt;/b&gt;") == 12, "some of them, from all rounds"
    assert "<b>burns</b>" not in page and "reward 0.12" in page and "blocks.1.fast" in page
