"""Text that does not shift: one source, its lines' blocks shuffled, cut into four. `python -m benchmarks.shuffled
SOURCE OUT`.

What a run loses to plain training where there is nothing to forget is the price of its machinery; `benchmarks.real_run`
measures it on what this writes. SOURCE is a folder with train.txt and valid.txt; OUT gets one/, two/, three/ and four/
with both.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import List

NAMES = ("one", "two", "three", "four")
BLOCK = 2048
"""Characters that stay together, at least: whole lines."""


def blocks(text: str) -> List[str]:
    """Whole lines together, in pieces of `BLOCK` characters or a little more."""
    found, held, size = [], [], 0
    for line in text.splitlines(keepends=True):
        held.append(line)
        size += len(line)
        if size >= BLOCK:
            found.append("".join(held))
            held, size = [], 0
    return [*found, "".join(held)] if held else found


def write_parts(source: Path, out: Path, seed: int = 0) -> None:
    """Shuffle and cut; ValueError where a file is missing."""
    for name in ("train.txt", "valid.txt"):
        file = source / name
        if not file.is_file():
            raise ValueError(f"{file} does not exist; SOURCE is a folder with train.txt and valid.txt")
        pieces = blocks(file.read_text(encoding="utf-8"))
        random.Random(seed).shuffle(pieces)
        for i, part in enumerate(NAMES):
            (out / part).mkdir(parents=True, exist_ok=True)
            (out / part / name).write_text("".join(pieces[i :: len(NAMES)]), encoding="utf-8")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shuffled", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    write_parts(options.source, options.out)
    print(f"{options.source} shuffled and cut into {', '.join(NAMES)} below {options.out}")


if __name__ == "__main__":
    main()
