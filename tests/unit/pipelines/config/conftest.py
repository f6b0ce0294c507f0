"""What tests of the configuration share."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import pytest


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """Write a YAML file; returns its name."""

    def to_file(text: str) -> str:
        path = tmp_path / "given.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return to_file
