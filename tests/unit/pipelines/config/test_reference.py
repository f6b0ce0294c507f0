"""What the configuration says of itself: every key is documented; page and schema say what the code says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Dict

import pytest
import yaml
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from cluster.cli import app
from pipelines.config.documentation import docs_of, every_key, find
from pipelines.config.json_schema import json_schema
from pipelines.config.load import flatten, load_config, shipped_files, to_yaml
from pipelines.config.reference import explain, page, setters
from pipelines.config.schema import Config
from pipelines.config.sleep import SleepConfig

ROOT = Path(__file__).resolve().parents[4]
VALID = Draft202012Validator(json_schema())


def errors(tree: Any) -> str:
    return "; ".join(error.json_path for error in VALID.iter_errors(tree))


@pytest.mark.parametrize("key", every_key(), ids=lambda key: key.name)
def test_every_key_has_a_line_of_documentation(key: Any) -> None:
    assert len(key.doc) > 10 and key.doc.endswith((".", ".)", '"')), key.doc


def test_documentation_is_read_from_below_the_field() -> None:
    docs = docs_of(SleepConfig)
    assert docs["batch"] == "Sequences per step over all ranks together."
    assert docs["balance"].startswith("0: older experience") and "\n" not in docs["balance"]
    assert set(docs) == set(SleepConfig.__dataclass_fields__)


def test_every_key_of_a_resolved_configuration_is_found() -> None:
    from dataclasses import asdict

    for name in flatten(asdict(Config())):
        found = find(name)
        assert found is not None and not found.is_section, name


def test_the_page_is_what_the_code_says() -> None:
    written = (ROOT / "docs" / "reference" / "configuration.md").read_text(encoding="utf-8")
    assert written == page(), "run `circadian config reference` and commit docs/reference/configuration.md"


def test_every_row_of_the_page_has_five_cells() -> None:
    rows = [line for line in page().splitlines() if line.startswith("|")]
    assert len(rows) > 200 and {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}


def test_a_key_is_explained() -> None:
    text = explain("wake.batch")
    for line in ("wake.batch: whole number", "default  16", "must be at least 0", "set by   strategy=replay: 0"):
        assert line in text
    assert "Sequences per wake step." in text
    assert "default  .inf" in explain("gate.max_drift") and "default  null" in explain("stream.path")
    assert "text, or null" in explain("stream.path") and "default  []" in explain("base.sources")
    assert "default  192" in explain("levels.fast.width") and "default  256" in explain("levels.mine.width")
    assert "number per name" in explain("gate.budgets.docs") and "number per name" in explain("gate.budgets[a.b]")


@pytest.mark.parametrize("name", ["run", "levels", "levels.fast", "sleep.imitation", "levels.slow.optimizer"])
def test_a_section_lists_its_keys(name: str) -> None:
    text, found = explain(name), find(name)
    assert found is not None
    for key in every_key():
        if key.name.startswith(f"{found.name}.") and not key.name.endswith("NAME"):
            inner = key.name.removeprefix(f"{found.name}.").removeprefix("NAME.")
            assert (f"  {key.name} " in text) == ("." not in inner), key.name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wake.batchh", r"config explain: unknown key 'wake\.batchh'; did you mean 'wake\.batch'"),
        ("batch_size", r"config explain: unknown key 'batch_size'; use wake\.batch"),
        ("xyz", r"unknown key 'xyz'; known here: "),
        ("wake.batch.x", r"wake\.batch is a single value"),
        ("wake..batch", r"is not of the form"),
        ("", r"is not of the form"),
    ],
)
def test_a_key_that_is_not_there_leads_to_one_that_is(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain(name)


def test_who_sets_a_key_is_told_with_the_value() -> None:
    assert ("strategy=guided", 0.1) in setters("sleep.teacher")
    assert ("configuration smoke", 512) in setters("levels.fast.period")
    assert ("--preset micro, levels.slow.width", 256) in setters("levels.NAME.width")
    assert setters("dreams.ngram") == []


def test_the_schema_is_one_and_takes_what_is_shipped_and_what_is_resolved() -> None:
    Draft202012Validator.check_schema(json_schema())
    for where, tree in shipped_files():
        assert not errors(tree), where
    for name in ("default", "smoke"):
        assert not errors(yaml.safe_load(to_yaml(load_config(name))))


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"run": {"name": 1, "seed": 0}},
        {"wake": {"batch": "${sleep.batch}"}},
        {"levels": {"mine": {"period": 64, "optimizer": {"lr": 1}}}},
        {"control": {"enabled": True}},
        {"stream": {"path": None, "sources": ["a", 1]}},
        {"gate": {"budgets": {"docs": 0.5}, "max_regression": -1}},
        {"when": {"policies": ["tokens", "idle"]}},
    ],
    ids=str,
)
def test_the_schema_takes_what_is_right(tree: Dict[str, Any]) -> None:
    assert not errors(tree)


@pytest.mark.parametrize(
    ("tree", "place"),
    [
        ({"wake": {"batchh": 1}}, "$.wake"),
        ({"wkae": {}}, "$"),
        ({"wake": {"batch": -1}}, "$.wake.batch"),
        ({"wake": {"batch": 1.5}}, "$.wake.batch"),
        ({"wake": {"batch": "many"}}, "$.wake.batch"),
        ({"base": {"lr": 0}}, "$.base.lr"),
        ({"run": {"seed": 1 << 31}}, "$.run.seed"),
        ({"run": {"deterministic": "yes"}}, "$.run.deterministic"),
        ({"run": {"name": None}}, "$.run.name"),
        ({"sleep": {"recent": 1.5}}, "$.sleep.recent"),
        ({"sleep": {"jsd_beta": 1}}, "$.sleep.jsd_beta"),
        ({"sleep": {"sampler": "oldest"}}, "$.sleep.sampler"),
        ({"sleep": {"optimizer": {"beta1": 1.0}}}, "$.sleep.optimizer.beta1"),
        ({"levels": {"mine": {"owner": "me"}}}, "$.levels.mine.owner"),
        ({"dreams": {"top_p": 0}}, "$.dreams.top_p"),
        ({"when": {"policies": ["moon"]}}, "$.when.policies[0]"),
        ({"stream": {"sources": "docs"}}, "$.stream.sources"),
        ({"gate": {"budgets": {"docs": "much"}}}, "$.gate.budgets.docs"),
    ],
    ids=str,
)
def test_the_schema_refuses_what_is_wrong(tree: Dict[str, Any], place: str) -> None:
    assert place in errors(tree).split("; ")


def test_the_commands_print_and_write(tmp_path: Path) -> None:
    def run(*words: str) -> str:
        done = CliRunner().invoke(app, ["config", *words], catch_exceptions=False)
        assert done.exit_code == 0
        return done.output

    assert run("explain", "wake.batch").startswith("wake.batch: whole number")
    assert json.loads(run("schema")) == json_schema()
    assert "wrote" in run("schema", "--out", str(tmp_path / "new" / "schema.json"))
    assert json.loads((tmp_path / "new" / "schema.json").read_text()) == json_schema()
    run("reference", "--out", str(tmp_path / "page.md"))
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == page()
