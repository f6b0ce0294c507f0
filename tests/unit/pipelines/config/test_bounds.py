"""Bounds: no number of any key is endless, negative or nothing at all unless its documentation says what that means."""

from __future__ import annotations

import math
import re
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, List, Sequence

import pytest

from nl_model.checks import at_least, listening
from pipelines.config.documentation import NAME, Key, every_key
from pipelines.config.load import load_config
from pipelines.config.schema import Config


def numbers(kind: type) -> List[Key]:
    return [key for key in every_key() if key.kind is kind]


def build(value: Any, parts: Sequence[str], new: Any) -> Any:
    """A value object with one field, however deep, set anew."""
    first, *rest = parts
    if isinstance(value, dict):
        first = first if first != NAME else next(iter(value))
        return {**value, first: build(value[first], rest, new) if rest else new}
    assert is_dataclass(value) and not isinstance(value, type)
    return replace(value, **{first: build(getattr(value, first), rest, new) if rest else new})


def refused(key: Key, value: Any) -> bool:
    """Whether a value is refused; then the message must name key, value and bound."""
    try:
        build(Config(), key.name.split("."), value)
    except ValueError as error:
        name = key.name.split(".")[-1]
        assert re.search(rf"\b{name}={re.escape(str(value))}\b", str(error)), error
        return True
    return False


@pytest.mark.parametrize("key", numbers(float), ids=lambda key: key.name)
def test_a_number_is_finite_unless_its_documentation_says_what_an_endless_one_means(key: Key) -> None:
    assert refused(key, math.nan)
    assert refused(key, math.inf) != bool(re.search(r"(?<!-)\.inf\b", key.doc)), key.doc
    assert refused(key, -math.inf) != ("-.inf" in key.doc), key.doc


@pytest.mark.parametrize("key", numbers(int), ids=lambda key: key.name)
def test_a_whole_number_is_not_negative_and_nothing_only_where_its_documentation_says_what_that_means(key: Key) -> None:
    assert refused(key, -1) or re.search(r"(?<!\S)-1\b", key.doc), key.doc
    assert refused(key, 0) or re.search(r"\b0\b", key.doc), key.doc


@pytest.mark.parametrize("key", [*numbers(int), *numbers(float)], ids=lambda key: key.name)
def test_the_bound_of_every_number_is_known(key: Key) -> None:
    assert key.bound


@pytest.mark.parametrize("key", [key for key in numbers(float) if key.name.endswith("lr")], ids=lambda key: key.name)
def test_a_step_size_of_nothing_is_refused_or_documented(key: Key) -> None:
    assert refused(key, -1e-3) and (refused(key, 0.0) or "0 writes nothing" in key.doc)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.seed=-1"], r"run\.seed=-1 must lie in \[0, 2147483647\]"),
        (["run.seed=2147483648"], r"run\.seed=2147483648 must lie in"),
        (["base.lr=inf"], r"base\.lr=inf must be above 0, and finite"),
        (["base.lr=0"], r"base\.lr=0\.0 must be above 0"),
        (["sleep.optimizer.lr=0"], r"sleep\.optimizer\.lr=0\.0 must be above 0"),
        (["levels.fast.optimizer.lr=-.inf"], r"^levels\.fast\.optimizer\.lr=-inf must be at least 0, and finite"),
        (["control.learning_rates=[0.1,inf]"], r"control\.learning_rates has inf; give step sizes above 0"),
        (["gate.budgets={a: -1}"], r"gate\.budgets\.a=-1\.0 must be at least 0"),
        (["gate.budgets={a: nan}"], r"gate\.budgets\.a=nan must be at least 0"),
        (["ray.object_store_mb=10"], r"ray\.object_store_mb=10 must be at least 75"),
        (["failures.pool=-1"], r"failures\.pool=-1 must be at least 0"),
        (["failures.call_timeout=0"], r"failures\.call_timeout=0\.0 must be above 0"),
        (["pool.timeout=inf"], r"pool\.timeout=inf must be above 0, and finite"),
        (["store.commit_bytes=0"], r"store\.commit_bytes=0 must be at least 1"),
        (["model.rope_base=0"], r"model\.rope_base=0\.0 must be above 0"),
        (["model.memory.chunk=0"], r"^model\.memory\.chunk=0 must be at least 1"),
        (["levels.fast.period=0"], r"^levels\.fast\.period=0 must be at least 1"),
        (["levels.fast.owner=me"], r"^levels\.fast\.owner='me' is unknown; use one of learner, pool"),
        (["sleep.optimizer.beta2=1"], r"^sleep\.optimizer\.beta2=1\.0 must lie in \[0, 1\)"),
    ],
)
def test_a_number_out_of_bounds_is_named(overrides: List[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("default", overrides)


def test_no_bound_is_a_bound_where_it_is_documented(tmp_path: Path) -> None:
    path = tmp_path / "given.yaml"
    path.write_text("gate: {max_drift: .inf, max_forgetting: inf, min_progress: -.inf, budgets: {a: .inf}}")
    gate = load_config(str(path)).gate
    assert gate.max_drift == gate.max_forgetting == gate.budgets["a"] == math.inf and gate.min_progress == -math.inf


def test_whoever_listens_hears_bounds_and_nobody_else_does() -> None:
    with listening() as found:
        at_least("a", 1, 1)
        with pytest.raises(ValueError, match="b=0 must be at least 1"):
            at_least("b", 0, 1)
    at_least("c", 1, 1)
    assert found == {"a": "be at least 1", "b": "be at least 1"}
