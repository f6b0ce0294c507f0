"""Dreams in the store: keys of their own, no doubles, never counted as experience, older stores still read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, List

import numpy as np
import pytest

import pipelines.experience.manifest
import pipelines.experience.store
from pipelines.experience import DREAM_KEY, ExperienceStore, Record, Snapshot, dream_key, list_store, verify
from pipelines.experience.manifest import Manifest, State
from pipelines.experience.schema import make_schema

CONTEXT = 4


def real(key: int) -> Record:
    kind = "base" if key < 0 else "real"
    return Record(key=key, source="docs", kind=kind, tokens=np.full(CONTEXT + 1, abs(key)))


def dreamt(round_number: int, number: int, **values: Any) -> Record:
    fields = {"parents": (0, 2), "kind": "dream", "source": "(dreams)", **values}
    return Record(key=dream_key(round_number, number), tokens=np.arange(CONTEXT + 1), **fields)


def open_store(path: Path) -> ExperienceStore:
    return ExperienceStore.open(path, CONTEXT, "uint16")


def test_keys_are_a_function_of_round_and_number() -> None:
    assert dream_key(0, 0) == DREAM_KEY and dream_key(3, 5) == DREAM_KEY + (3 << 20) + 5
    assert dream_key(2, (1 << 20) - 1) < dream_key(3, 0) < 1 << 63
    with pytest.raises(ValueError, match="dream 1048576 of round 1"):
        dream_key(1, 1 << 20)


def test_a_repeated_round_doubles_nothing(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with open_store(path) as store:
        store.append([real(-1), *map(real, range(3))], {"at": 3})
        store.append([dreamt(1, n) for n in range(2)])
        store.commit()
    for _ in range(2):  # also after a restart
        with open_store(path) as store:
            version = store.version
            store.append([dreamt(1, n) for n in range(2)])
            assert store.commit() == version and store.ignored == 2
            assert store.cursor == {"at": 3}
    with open_store(path) as store:
        store.append(list(map(real, range(3, 5))), {"at": 5})
        store.append([dreamt(4, n) for n in range(3)])
        store.append([dreamt(5, 0)])
        store.commit()
        assert (store.last_key, store.base_rows, store.dreams, store.rows) == (4, 1, 6, 12)
        assert store.by_source == {"docs": 6, "(dreams)": 6}
        store.append([dreamt(4, n) for n in range(3)])
        assert store.ignored == 3
    report = verify(path)
    assert report.ok and (report.rows, report.duplicates, report.missing_keys) == (12, 0, 0)
    assert sum(info.rows for info in list_store(path)) == 12


def test_a_snapshot_tells_dreams_apart(tmp_path: Path) -> None:
    with open_store(tmp_path / "store") as store:
        store.append([real(-1), *map(real, range(3))])
        early = store.commit()
        store.append([dreamt(1, n) for n in range(2)])
        store.commit()
        store.append(list(map(real, range(3, 5))))
        store.append([dreamt(2, 0, subject="me")])
        store.commit()
    first = Snapshot.open(tmp_path / "store", early)
    for snapshot in (Snapshot.open(tmp_path / "store"), first.extend()):
        assert snapshot.rows_between(-9, DREAM_KEY * 2 - 1).tolist() == [0, 1, 2, 3, 6, 7], "real rows only"
        dreams = [dream_key(1, 0), dream_key(1, 1), dream_key(2, 0)]
        assert snapshot.keys[[4, 5, 8]].tolist() == dreams and snapshot.last_key == 4
        made: List[Record] = snapshot.records(np.array([8, 7]))
        assert made[0].parents == (0, 2) and made[0].kind == "dream" and made[0].subject == "me"
        assert made[1].parents is None and made[1].kind == "real"
    assert len(first) == 4 and first.keys.max() < DREAM_KEY


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (dreamt(1, 0, kind="real"), "kind 'dream' and keys from 2\\^62 go together"),
        (replace(real(0), kind="dream", parents=(0,)), "kind 'dream' and keys from 2\\^62 go together"),
        (dreamt(1, 0, parents=None), "a dream, and nothing else, has at least one"),
        (dreamt(1, 0, parents=()), "a dream, and nothing else, has at least one"),
        (dreamt(1, 0, parents=(0, dream_key(0, 0))), "no dream is a parent"),
        (replace(real(0), parents=(0,)), "a dream, and nothing else, has at least one"),
    ],
)
def test_marks_cannot_be_wrong(tmp_path: Path, record: Record, message: str) -> None:
    with open_store(tmp_path / "store") as store:
        with pytest.raises(ValueError, match=message):
            store.append([record])
        store.append([real(0)])  # nothing of the refused call stays behind
        store.commit()
        assert store.rows == 1


def test_a_lost_dream_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with open_store(path) as store:
        store.append([real(0)])
        store.append([dreamt(1, n) for n in range(2)])
        store.commit()
    segment = path / "segments" / "00000000.arrow"
    segment.write_bytes(segment.read_bytes()[:-8])
    report = verify(path)
    assert not report.ok and report.missing_keys == 2


def test_a_store_of_the_first_format_goes_on_without_dreams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store"

    class First(State):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.entry = replace(self.entry, format=1)

    with monkeypatch.context() as patch:
        patch.setattr(pipelines.experience.store, "State", First)
        with open_store(path) as store:
            store.append([real(-1), real(0)])
            store.commit()
    with open_store(path) as store:
        store.append([real(1)])
        store.commit()
        with pytest.raises(ValueError, match=r"no room for dreams; use dreams\.share=0"):
            store.append([dreamt(1, 0)])
    assert Manifest(path).load().entry.format == 1 and "parents" not in make_schema(CONTEXT, "uint16", 1).names
    assert verify(path).ok and Snapshot.open(path).records(np.array([2]))[0].key == 1
