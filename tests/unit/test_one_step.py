"""There is one training step: a loss, a backward pass and a write meet in one function of the tree."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import List

ROOT = Path(__file__).resolve().parents[2]
OWN = {
    "nl_model/online.py",  # sums of gradients over a level's period: no write follows
    "nl_model/flops.py",  # counts products on tensors without storage
    "pipelines/sleep/engine.py",  # the engines: what a step asks of them
    "cluster/pool/engine.py",
    "pipelines/sleep/training.py",
    "pipelines/wake/online_training.py",  # passes on to its engine once text is durable
}
"""Files that call `backward`, and why."""


def calls(path: Path, name: str) -> List[int]:
    """Lines on which a method of this name is called."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))
    return [node.lineno for node in found if node.func.attr == name]  # type: ignore[attr-defined]


def test_backward_is_called_where_it_is_said() -> None:
    files = [path for package in ("nl_model", "pipelines", "cluster") for path in (ROOT / package).rglob("*.py")]
    assert {str(path.relative_to(ROOT)) for path in files if calls(path, "backward")} == OWN


def test_a_comparison_trains_nothing_itself() -> None:
    """No backward pass, no write and no schedule, in the hooks of opponents neither."""
    files = sorted((ROOT / "pipelines" / "compare").rglob("*.py"))
    words = ("optimizer.step", "learning_rate(", "Schedule(", "training_step", "clip_grad")
    assert files
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not calls(path, "backward") and not calls(path, "zero_grad"), path
        assert not [word for word in words if word in text], path
