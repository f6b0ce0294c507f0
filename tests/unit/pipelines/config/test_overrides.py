"""Overrides: text arrives as it was written, everything else has the type of its key or is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config.keys import kind_at, split_key
from pipelines.config.load import flatten, load_config, to_yaml
from pipelines.config.schema import Config
from pipelines.config.values import read_overrides

AS_WRITTEN = (
    *("001", "2024_01", "12:30", "on", "off", "yes", "no", "true", "1.10", "exp #2", "1e3", "0x10", "~", " a ", "NULL"),
    *(
        "*.txt",
        "{a,b}.txt",
        "[ab].txt",
        "@x",
        "%x",
        "!x",
        "&x",
        "a: b",
        "- a",
        "'a'",
        '"a',
        "a=b",
        "=",
        "#",
        "`x`",
        "|",
    ),
    *("a\\b", "$x", "$", "{}", "[]", "ä", "\u2028", "None", ".inf", "<<", "?", "??", "????"),
)
TEXT_KEYS = ("run.name", "stream.path", "stream.text_field", "base.checkpoint", "tracking.experiment", "ray.python")


@pytest.mark.parametrize("key", TEXT_KEYS)
def test_text_arrives_as_it_was_written(key: str) -> None:
    for text in AS_WRITTEN:
        assert _at(read_overrides([f"{key}={text}"]), key) == text


@pytest.mark.parametrize("text", ["001", "2024_01", "12:30", "on", "1.10", "exp #2", "!x", "[ab].txt", "{a,b}.txt"])
def test_a_runs_name_and_a_path_come_through_to_the_configuration_and_back(text: str, tmp_path: Path) -> None:
    config = load_config("smoke", [f"run.name={text}", f"stream.path={text}", f"levels.fast.optimizer.name={'sgd'}"])
    assert (config.run.name, config.stream.path) == (text, text)
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "resolved.yaml")) == config


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_arrives_as_it_was_written(text: str) -> None:
    key = "tracking.experiment"
    if text != "???":
        assert _at(read_overrides([f"{key}={text}"]), key) == text


@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(exclude_characters="$", exclude_categories=())))
def test_any_text_comes_through_to_the_configuration_and_back(tmp_path_factory: Any, text: str) -> None:
    if text == "???":
        return
    config = load_config("smoke", [f"tracking.experiment={text}"])
    assert config.tracking.experiment == text
    path = tmp_path_factory.mktemp("given") / "resolved.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(path)) == config


@settings(max_examples=200, deadline=None)
@given(st.lists(st.from_regex(r"[A-Za-z0-9_./:+-]*[A-Za-z0-9_]", fullmatch=True), max_size=5))
def test_names_in_a_list_arrive_as_they_were_written(names: List[str]) -> None:
    names = [name for name in names if not name.startswith(("- ", "-", ":")) and ":" not in name]
    assert read_overrides([f"stream.sources=[{','.join(names)}]"]) == {"stream": {"sources": names}}


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("stream.sources=[no,de]", ["no", "de"]),
        ("stream.sources=[001, 1.10, 'a,b', true, 1:30, 0x1]", ["001", "1.10", "a,b", "true", "1:30", "0x1"]),
        ("stream.sources=[]", []),
        ("stream.sources=['null', \"no\"]", ["null", "no"]),
        ("control.learning_rates=[1e-3,2,.5]", [0.001, 2.0, 0.5]),
        ("gate.budgets={no: 1e-1, a.txt: 2}", {"no": 0.1, "a.txt": 2.0}),
        ("gate.budgets[a.b.txt]=1", {"a.b.txt": 1.0}),
        ("gate.max_drift=.inf", float("inf")),
        ("gate.min_progress=-inf", float("-inf")),
        ("wake.batch=0x10", 16),
        ("wake.batch=+8", 8),
        ("wake.batch= 8 ", 8),
        ("base.tokens=1_000_000", 1_000_000),
        ("base.lr=1e-3", 0.001),
        ("base.lr=1", 1.0),
        ("run.deterministic=True", True),
        ("levels.fast.optimizer={lr: 1e-2, name: sgd}", {"lr": 0.01, "name": "sgd"}),
        ("control.enabled=true", "true"),
        ("stream.path=null", None),
        ("stream.path=", None),
        ("run.name=null", "null"),
        ("levels[fast].period=512", 512),
    ],
)
def test_values_have_the_type_of_their_key(override: str, value: Any) -> None:
    key, tree = override.partition("=")[0], read_overrides([override])
    found = _at(tree, key if not key.startswith("gate.budgets[") else "gate.budgets")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("wake.batch=abc", r"wake\.batch: 'abc' is no whole number; give one, for instance wake\.batch=16"),
        ("wake.batch=1_0", r"wake\.batch: '1_0' is no whole number"),
        ("wake.batch=[1]", r"wake\.batch: '\[1\]' is no whole number"),
        ("wake.batch=${x", r"wake\.batch: "),
        ("run.deterministic=on", r"run\.deterministic: 'on' is neither true nor false; .*run\.deterministic=true"),
        ("run.deterministic=0", r"run\.deterministic: '0' is neither true nor false; .*run\.deterministic=false"),
        ("base.lr=fast", r"base\.lr: 'fast' is no number; give one, for instance base\.lr=0\.001"),
        ("base.lr=1,5", r"base\.lr: '1,5' is no number"),
        ("base.lr=null", r"base\.lr: 'null' is no number"),
        ("stream.sources=docs", r"stream\.sources: 'docs' is no list; .* stream\.sources=\[name\]"),
        ("stream.sources=", r"stream\.sources: '' is no list"),
        ("stream.sources=null", r"stream\.sources: 'null' is no list"),
        ("stream.sources=[a", r"stream\.sources: '\[a' is no list"),
        ("stream.sources=[@x]", r"stream\.sources: '\[@x\]' is no list"),
        ("stream.sources=[a] # b", r"stream\.sources: '\[a\] # b' is no list"),
        ("stream.sources=[a b: c]", r"stream\.sources\[0\] is a single value"),
        ("stream.sources=[a,[b]]", r"stream\.sources\[1\]: \['b'\] is no single text"),
        ("stream.sources=[null]", r"stream\.sources\[0\]: 'null' is no single text"),
        ("stream.sources={a: 1}", r"stream\.sources: \{'a': '\.\.\.'\} is no list"),
        ("gate.budgets=0.5", r"gate\.budgets=0\.5 must be a section"),
        ("gate.budgets={a: x}", r"gate\.budgets\.a: 'x' is no number"),
        ("gate.budgets={a: 1, a: 2}", r"key 'a' stands twice"),
        ("wake={batch: x}", r"wake\.batch: 'x' is no whole number"),
        ("wake=3", r"wake=3 must be a section"),
        ("wake=${sleep}", r"wake=\$\{sleep\} must be a section"),
        ("control.learning_rates[0]=0.1", r"control\.learning_rates is a single value"),
        ("levels[fast.period=3", r"key 'levels\[fast\.period' is not of the form section\.key"),
        ("run..name=3", r"key 'run\.\.name' is not of the form section\.key"),
        (".name=3", r"key '\.name' is not of the form"),
        ("run.name=${nobody.knows}", r"run\.name: "),
        ("run.name=${nobody:knows}", r"run\.name: "),
        ("wake.batch=" + "9" * 5000, r"wake\.batch: '9+\.\.\. is no whole number"),
        ("stream.sources=" + "[" * 5000, r"stream\.sources: '\[+\.\.\. is no list"),
    ],
    ids=lambda value: value[:30],
)
def test_what_cannot_be_read_is_said_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_config("default", [override])
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("key", ["run.name", "stream.path", "wake.batch", "base.lr", "run.deterministic", "stream"])
def test_what_is_missing_must_be_given(key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"the command line: {key} must be given"):
        load_config("default", [f"{key}=???"])
    path, text = tmp_path / "given.yaml", "???"
    for part in reversed(key.split(".")):
        text = f"{{{part}: {text}}}"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"given\.yaml, line 1: {key} must be given"):
        load_config(str(path))


@pytest.mark.parametrize(
    "override", ["stream.sources=[a,???]", "gate.budgets={a: ???}", "levels={fast: {width: '???'}}"]
)
def test_what_is_missing_within_a_value_must_be_given(override: str) -> None:
    with pytest.raises(ValueError, match="must be given"):
        load_config("default", [override])


def test_an_interpolation_on_the_command_line_is_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIRCADIAN_TEST", "from here")
    overrides = ["run.name=s${run.seed}", "run.seed=7", "tracking.experiment=${oc.env:CIRCADIAN_TEST}"]
    config = load_config("smoke", [*overrides, "wake.batch=${sleep.batch}"])
    assert (config.run.name, config.tracking.experiment, config.wake.batch) == ("s7", "from here", 8)


@pytest.mark.parametrize("text", ["${x}", "a\\${b}", "\\\\${c}d", "${", "$${x}", "${a}\\", "${oc.env:HOME}"])
def test_what_looks_like_an_interpolation_survives_in_a_resolved_file(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIRCADIAN_TEST", text)
    config = load_config("smoke", ["tracking.experiment=${oc.env:CIRCADIAN_TEST}"])
    assert config.tracking.experiment == text
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "resolved.yaml")) == config


def test_later_overrides_win_and_sections_are_laid_over_one_another() -> None:
    config = load_config("smoke", ["run.seed=1", "run={seed: 2, name: a}", "run.name=b"])
    assert (config.run.seed, config.run.name) == (2, "b")


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("run", ["run"]),
        ("run.name", ["run", "name"]),
        ("levels[fast].period", ["levels", "fast", "period"]),
        ("levels.[fast].period", ["levels", "fast", "period"]),
        ("gate.budgets[a.b]", ["gate", "budgets", "a.b"]),
    ],
)
def test_a_key_is_split_at_its_dots(key: str, parts: List[str]) -> None:
    assert split_key(key) == parts


def test_every_key_has_a_type() -> None:
    from dataclasses import asdict

    for key in flatten(asdict(Config())):
        assert kind_at(key.split(".")) is not None, key
    assert kind_at(["run", "nmae"]) is None and kind_at(["run", "name", "x"]) is None


def _at(tree: Any, key: str) -> Any:
    for part in split_key(key):
        tree = tree[part]
    return tree
