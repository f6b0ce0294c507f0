"""What the documents say of the code is there: every stop of the walks, every room of the table."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import List, Tuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
STOP = re.compile(r"`(?P<file>[a-z_/]+\.py)`\s+`(?P<names>[A-Za-z_.]+)`(?:, `(?P<more>[A-Za-z_.]+)`)?")


def walks() -> List[Tuple[str, List[Tuple[str, str]]]]:
    """(title, stops) of every walk; a stop is a file and a function or class."""
    section = TEXT.split("## Four walks")[1].split("\n## ")[0]
    found = []
    for part in re.split(r"\n\n\*\*", section)[1:]:
        stops = [(m["file"], name) for m in STOP.finditer(part) for name in (m["names"], m["more"]) if name]
        found.append((part.split("**")[0], stops))
    return found


def find(file: str) -> Path:
    """The file that a walk means: from the root, or below pipelines or cluster."""
    places = [ROOT / file, ROOT / "pipelines" / file, ROOT / "cluster" / file]
    there = [place for place in places if place.is_file()]
    assert there, f"{file} is nowhere"
    return there[0]


@pytest.mark.parametrize(("title", "stops"), walks(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_stop_of_a_walk_is_there(title: str, stops: List[Tuple[str, str]]) -> None:
    assert len(stops) >= 4, title
    for file, name in stops:
        source = find(file).read_text(encoding="utf-8")
        last = name.split(".")[-1]
        assert re.search(rf"^\s*(async )?(def|class) {last}\b", source, re.M), f"{title}: {file} has no {name}"


@pytest.mark.parametrize(("title", "stops"), walks(), ids=lambda value: value if isinstance(value, str) else "")
def test_no_stop_is_visited_three_times(title: str, stops: List[Tuple[str, str]]) -> None:
    assert max(Counter(file for file, _ in stops).values()) <= 3, title
    assert max(Counter(stops).values()) <= 1, title


def test_every_room_is_in_the_table() -> None:
    for package in ("pipelines", "cluster"):
        rooms = [path.name for path in (ROOT / package).iterdir() if (path / "__init__.py").is_file()]
        assert rooms
        for room in rooms:
            assert f"`{room}/`" in TEXT, f"{package}/{room} is not in the table of rooms"
