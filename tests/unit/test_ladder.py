"""The rules of the house that a type checker does not see: who may import whom, how long a file may be."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Dict, Iterator, List, Set

import pytest

from pipelines.config.load import load_config, shipped_configs, to_yaml
from pipelines.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
LADDER: Dict[str, Set[str]] = {
    "nl_model": {"pipelines", "cluster", "benchmarks", "ray", "deepspeed", "mlflow", "pyarrow"},
    "pipelines": {"cluster", "benchmarks", "ray", "deepspeed"},
    "cluster": {"benchmarks"},
}
"""What each package must not import; tests are above all of them."""
LONGEST = 400
LAZY = "lazy.py"
"""The one module that imports by a computed name: of the package that asks it, and of nothing else."""


def python_files(*folders: str) -> List[Path]:
    found = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [path for path in found if path != ROOT / "nl_model" / LAZY]


def imported(source: str) -> Iterator[str]:
    """Top-level packages that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            assert node.module is not None
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            first = node.args[0]
            assert isinstance(first, ast.Constant), "a computed import cannot be checked"
            yield str(first.value).split(".")[0]


def offences(package: str, source: str) -> Set[str]:
    return set(imported(source)) & (LADDER[package] | {"tests"})


@pytest.mark.parametrize("package", sorted(LADDER))
def test_imports_go_down_only(package: str) -> None:
    files = python_files(package)
    assert files
    found = {str(path.relative_to(ROOT)): bad for path in files if (bad := offences(package, path.read_text()))}
    assert found == {}


@pytest.mark.parametrize(
    ("package", "source", "bad"),
    [
        ("nl_model", "import pyarrow.ipc", {"pyarrow"}),
        ("nl_model", "def f() -> None:\n    from pipelines.config.schema import Config", {"pipelines"}),
        ("pipelines", "import importlib\nimportlib.import_module('deepspeed.zero')", {"deepspeed"}),
        ("pipelines", "import mlflow, pyarrow, torch\nfrom nl_model.model import NestedLM", set()),
        ("cluster", "import ray, deepspeed\nfrom pipelines.config.schema import Config", set()),
        ("cluster", "from tests.unit import helpers", {"tests"}),
    ],
)
def test_the_check_sees_what_it_should(package: str, source: str, bad: Set[str]) -> None:
    assert offences(package, source) == bad


def test_no_file_is_longer_than_it_should_be() -> None:
    files = python_files("nl_model", "pipelines", "cluster", "benchmarks", "deploy", "tests")
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_configuration_loads_and_comes_back(name: str, tmp_path: Path) -> None:
    cfg = load_config(name)
    assert isinstance(cfg, Config)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(cfg))
    assert load_config(str(resolved)) == cfg
    assert cfg.run.name == name, "two shipped configurations must not continue each other's run"


def test_transformers_is_imported_in_one_place_only() -> None:
    """It takes seconds to load; what needs it imports nl_model.hf, late."""
    files = python_files("nl_model", "pipelines", "cluster", "benchmarks")
    users = {path.parent.name for path in files if "transformers" in set(imported(path.read_text()))}
    assert users == {"hf"}
    for path in files:
        early = (node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom)))
        named = {a.name for n in early for a in n.names} | {n.module for n in early if isinstance(n, ast.ImportFrom)}
        assert path.parent.name == "hf" or not any(str(name).startswith("nl_model.hf") for name in named), path
