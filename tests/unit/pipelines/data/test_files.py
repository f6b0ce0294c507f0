"""Which files below a path are read: links followed once, everything else counted by kind, with a reason."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict

import pytest

from pipelines.config.schema import StreamConfig
from pipelines.data.corpus import open_corpus
from pipelines.data.files import find_files

TEXT = "".join(f"Line {i} of a text about rivers, lamps and stones, number {i * i}.\n\n" for i in range(100))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two texts, and a place elsewhere with more."""
    for name in ("data/aa.txt", "data/inner/bb.txt", "elsewhere/x.txt", "elsewhere/deep/y.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(TEXT)
    return tmp_path / "data"


def names(path: Path, pattern: str = "") -> list[str]:
    found = find_files(str(path / pattern) if pattern else str(path))
    return [file.relative_to(found.root).as_posix() for file in found.files]


def kinds(path: Path, pattern: str = "") -> Dict[str, int]:
    return {item.kind: item.count for item in find_files(str(path / pattern)).passed_over}


def test_linked_folders_are_read_under_the_name_of_their_link(folder: Path) -> None:
    os.symlink(folder.parent / "elsewhere", folder / "linked")
    assert names(folder) == ["aa.txt", "inner/bb.txt", "linked/deep/y.txt", "linked/x.txt"]
    assert open_corpus(StreamConfig(path=str(folder))).sources == ("aa", "inner", "linked")
    assert kinds(folder) == {}


@pytest.mark.parametrize("target", [".", "..", "inner", "../data/inner", "../elsewhere/back"])
def test_loops_are_cut_and_no_text_comes_twice(folder: Path, target: str) -> None:
    """`A` sorts before everything: a name of its own goes before a link's all the same."""
    os.symlink(folder, folder.parent / "elsewhere" / "back")
    os.symlink(target, folder / "A")
    os.symlink(folder.parent / "elsewhere", folder / "linked")
    assert names(folder) == ["aa.txt", "inner/bb.txt", "linked/deep/y.txt", "linked/x.txt"]
    assert kinds(folder) == {"links to folders that are read already": 2}


def test_two_links_to_nested_folders_lose_nothing(folder: Path) -> None:
    os.symlink(folder.parent / "elsewhere" / "deep", folder / "a")
    os.symlink(folder.parent / "elsewhere", folder / "b")
    assert names(folder) == ["a/y.txt", "aa.txt", "b/x.txt", "inner/bb.txt"]


def test_a_glob_goes_round_no_loop(folder: Path) -> None:
    os.symlink(".", folder / "again")
    assert names(folder, "**/*.txt") == ["aa.txt", "inner/bb.txt"]
    assert list(kinds(folder, "**/*.txt")) == ["links to folders that are read already"]


def test_what_is_not_read_is_counted_with_a_reason(folder: Path) -> None:
    for name in ("p.gz", "q.GZ", "r.json", "s.ndjson", "t.text", "Makefile", ".hidden.txt", ".git/config"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(TEXT)
    os.symlink("nowhere.txt", folder / "broken.txt")
    os.mkfifo(folder / "pipe.txt")
    (folder / "inner" / "empty.txt").write_text("\n \n")
    corpus = open_corpus(StreamConfig(path=str(folder)))
    assert corpus.sources == ("aa", "inner")
    found = {item.kind: item for item in corpus.passed_over}
    assert {kind: item.count for kind, item in found.items()} == {
        ".gz": 2, ".json": 1, ".ndjson": 1, ".text": 1, "files without an ending": 1, "hidden": 2,
        "neither files nor folders": 2, "files without text": 1,
    }  # fmt: skip
    assert found[".gz"].example == "p.gz" and "decompress" in found[".gz"].reason
    assert "'DIR/**/*.text'" in found[".text"].reason and ".jsonl" in found[".ndjson"].reason
    assert found["files without text"].example == "inner/empty.txt"


def test_a_folder_of_other_files_says_what_it_holds(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.gz").write_text("x")
    with pytest.raises(ValueError, match=r"holds no \.txt, .* file \(but 3 \.gz\); convert the data"):
        find_files(str(tmp_path))
