"""Nothing is lost or doubled when text is shuffled and cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.shuffled import NAMES, write_parts


def test_every_line_is_in_one_part_and_both_files_are_cut(tmp_path: Path) -> None:
    lines = [f"line {i} of the text\n" for i in range(2000)]
    for name in ("train.txt", "valid.txt"):
        (tmp_path / name).write_text("".join(lines))
    write_parts(tmp_path, tmp_path / "out")
    for name in ("train.txt", "valid.txt"):
        found = [line for part in NAMES for line in (tmp_path / "out" / part / name).open()]
        assert sorted(found) == sorted(lines) and found != lines
        sizes = [(tmp_path / "out" / part / name).stat().st_size for part in NAMES]
        assert max(sizes) < 1.6 * min(sizes)
    with pytest.raises(ValueError, match=r"train\.txt does not exist"):
        write_parts(tmp_path / "nowhere", tmp_path)
