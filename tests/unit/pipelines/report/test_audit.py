"""The audit log: what was written stays, and whatever is done to it shows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import List, Tuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.report.audit import GENESIS, AuditLog, Chain, read_audit, verify

SIZE = 6
KNOWN_AT = 3
QUIET = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def grown(path: Path, size: int = SIZE) -> Chain:
    """A log of `size` entries, and its chain."""
    chain, log = Chain(), AuditLog(path)
    for number in range(size):
        chain.begin()
        chain.add("promotion" if number % 2 else "rejection", round=number, figures={"ä": number / 3, "bad": math.nan})
        assert log.write(chain.unwritten) == 0
    return chain


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Tuple[Path, Chain, List[bytes]]:
    path = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    chain = grown(path)
    return path, chain, path.read_bytes().splitlines(keepends=True)


def test_a_log_that_nobody_touched_is_fine(whole: Tuple[Path, Chain, List[bytes]]) -> None:
    path, chain, lines = whole
    found = verify(path, chain.length, chain.head, {KNOWN_AT: json.loads(lines[KNOWN_AT - 1])["hash"]})
    assert found.ok and found.entries == SIZE and found.head == chain.head
    entries = read_audit(path)
    assert [entry["sequence"] for entry in entries] == list(range(SIZE))
    assert entries[0]["previous"] == GENESIS and entries[2]["figures"] == {"ä": 2 / 3, "bad": None}
    assert verify(path.with_name("none"), 0, GENESIS).ok, "a run without decisions has no log"


def broken(whole: Tuple[Path, Chain, List[bytes]], tmp_path: Path, content: bytes) -> bool:
    _, chain, lines = whole
    if content == b"".join(lines):
        return True  # nothing was changed
    other = tmp_path / "audit.jsonl"
    other.write_bytes(content)
    return not verify(other, chain.length, chain.head).ok


@given(data=st.data())
@QUIET
def test_any_single_edit_is_found(whole: Tuple[Path, Chain, List[bytes]], tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(b"".join(whole[2]))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))
    assert broken(whole, tmp_path, bytes(content))


@given(data=st.data())
@QUIET
def test_any_byte_put_in_or_taken_out_is_found(
    whole: Tuple[Path, Chain, List[bytes]], tmp_path: Path, data: st.DataObject
) -> None:
    content = b"".join(whole[2])
    place = data.draw(st.integers(0, len(content)))
    added = data.draw(st.binary(max_size=2))
    gone = data.draw(st.integers(0, 3))
    assert broken(whole, tmp_path, content[:place] + added + content[place + gone :])


@given(order=st.permutations(range(SIZE)), kept=st.integers(0, SIZE))
@QUIET
def test_any_reorder_removal_and_truncation_is_found(
    whole: Tuple[Path, Chain, List[bytes]], tmp_path: Path, order: List[int], kept: int
) -> None:
    assert broken(whole, tmp_path, b"".join(whole[2][i] for i in order[:kept]))


@pytest.mark.parametrize("kept", range(SIZE))
def test_a_log_written_anew_from_some_entry_on_is_found(
    whole: Tuple[Path, Chain, List[bytes]], tmp_path: Path, kept: int
) -> None:
    _, chain, lines = whole
    entries = [json.loads(line) for line in lines]
    forged = Chain(kept, entries[kept - 1]["hash"] if kept else GENESIS)
    for entry in entries[kept:]:
        forged.add("promotion", round=entry["round"], figures={})
    other = tmp_path / "audit.jsonl"
    other.write_bytes(b"".join(lines[:kept]))
    AuditLog(other).write(forged.unwritten)
    assert forged.length == SIZE and not verify(other, chain.length, chain.head).ok
    # Whoever rewrites the state as well still disagrees with the releases.
    known = {KNOWN_AT: entries[KNOWN_AT - 1]["hash"]}
    assert verify(other, forged.length, forged.head, known).ok == (kept >= KNOWN_AT)


def test_entries_beyond_what_the_run_remembers_are_found(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    chain = grown(path)
    remembered = (chain.length, chain.head)
    chain.begin()
    chain.add("rollback", release=9)
    AuditLog(path).write(chain.unwritten)
    assert verify(path, *remembered).errors == [f"the log has {SIZE + 1} entries, the run remembers {SIZE}"]


@pytest.mark.parametrize("torn", [0, 1, 40])
def test_writing_again_after_a_crash_doubles_nothing(tmp_path: Path, torn: int) -> None:
    path = tmp_path / "audit.jsonl"
    chain = grown(path, 3)
    chain.begin()
    chain.add("rejection", round=3)
    chain.add("plan_change", round=3)
    log = AuditLog(path)
    log.write(chain.unwritten)
    before = path.read_bytes()
    if torn:  # the crash came in the middle of the last line
        path.write_bytes(before[:-torn])
        assert not verify(path, chain.length, chain.head).ok
    for _ in range(2):
        assert log.write(chain.unwritten) == 0
        assert path.read_bytes() == before
    assert verify(path, chain.length, chain.head).ok


def test_a_gap_is_told_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    chain = grown(path, 4)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    chain.begin()
    chain.add("rejection", round=4)
    assert AuditLog(path).write(chain.unwritten) == 2
    found = verify(path, chain.length, chain.head)
    assert any("entries are missing" in error for error in found.errors)
