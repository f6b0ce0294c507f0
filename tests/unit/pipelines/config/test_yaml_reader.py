"""YAML files: words mean what YAML 1.2 says, no key stands twice, and errors name file and place in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, List

import pytest
import yaml

from pipelines.config.load import load_config
from pipelines.config.yaml_reader import TAG, compose, compose_any, read_text


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("on off yes no Yes NO y n 1:30 190:20:30 12:30:45 2024-01-01 2024_01 1_000 0b11 = 1.10.2 tRue nUll", "str"),
        ("true True FALSE false", "bool"),
        ("0 0123 -7 +7 0x1F 0o17 0777", "int"),
        ("1e-3 1E5 -1.5e+3 .5 1. 1.10 .inf -.INF .nan +.5e1", "float"),
        ("null ~ Null NULL", "null"),
    ],
)
def test_plain_words_are_those_of_yaml_1_2(words: str, kind: str) -> None:
    for word in words.split():
        assert compose_any(f"{word}\n", "x").tag == TAG + kind, word
        assert compose_any(f"'{word}'\n", "x").tag == TAG + "str", word


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("run: {name: a}\nwake: {batch: 8}\nrun: {seed: 1}\n", "run", (1, 3)),
        ("base:\n  lr: 1e-3\n  tokens: 3\n  lr: 5e-3\n", "base.lr", (2, 4)),
        ("base: {lr: 1e-3, tokens: 16384, lr: 5e-3}\n", "base.lr", (1, 1)),
        ("levels:\n  fast:\n    period: 512\n  slow: {}\n  'fast': {}\n", "levels.fast", (2, 5)),
        ("gate:\n  budgets:\n    1: 0.5\n    '1': 0.25\n", "gate.budgets.1", (3, 4)),
        ("when:\n  policies: [{a: 1, a: 2}]\n", "when.policies.a", (2, 2)),
        ("nobody:\n  knows: 1\n\n  knows: 1\n", "nobody.knows", (2, 4)),
    ],
)
def test_a_key_that_stands_twice_is_named_with_both_lines(
    write: Callable[[str], str], text: str, key: str, lines: List[int]
) -> None:
    with pytest.raises(
        ValueError, match=rf"given\.yaml: key '{key}' stands twice, on line {lines[0]} and on line {lines[1]}; keep one"
    ):
        load_config(write(text))


def test_two_sections_may_have_the_same_key_and_a_section_may_be_taken_over(write: Callable[[str], str]) -> None:
    config = load_config(write("base: &all {lr: 0.5, tokens: 4096}\nsleep: {batch: 4}\nwake: {batch: 8}\n"))
    assert (config.sleep.batch, config.wake.batch, config.base.lr) == (4, 8, 0.5)
    tree = compose("a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: *b\nd: {<<: *b, x: 4}\n", "x")
    found = {key.value: {k.value: v.value for k, v in value.value} for key, value in tree.value}
    assert found["b"] == found["c"] == {"x": "1", "y": "3"} and found["d"] == {"x": "4", "y": "3"}


@pytest.mark.parametrize(
    ("data", "shown", "offset"),
    [
        (b"run: {name: caf\xe9}\n", "e9", 15),
        ("run: {name: a}\n".encode("utf-16"), "ff", 0),
        (b"# \xc3\xa4\nrun: \x80\n", "80", 10),
        (b"run: \xed\xa0\x80\n", "ed", 5),
        (b"run: \xc3", "c3", 5),
    ],
)
def test_a_file_that_is_not_utf_8_is_named_with_the_place(tmp_path: Path, data: bytes, shown: str, offset: int) -> None:
    path = tmp_path / "given.yaml"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"given\.yaml is not UTF-8: byte 0x{shown} at offset {offset}; save it"):
        load_config(str(path))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "given.yaml"
    path.write_bytes(b"\xef\xbb\xbfrun: {name: first}\n")
    assert read_text(path).startswith("run") and load_config(str(path)).run.name == "first"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run:\n  name: [a\n", r"is not valid YAML: line 3, column 1: "),
        ("run: {name: @x}", r"is not valid YAML: line 1, column 13: "),
        ("run: {name: a}\n---\nrun: {name: b}\n", r"is not valid YAML: line 2, column 1: "),
        ("run: {name: \x07}", "is not valid YAML: "),
        ("a: &a [*a]", r"line 1: a holds itself"),
        ("a: &a {b: {c: *a}}", r"line 1: a\.b\.c holds itself"),
        ("\n? [a, b]\n: 1", r"line 2: a key must be a plain name"),
        ("run: {name: !mine x}", "line 1: the tag '!mine' means nothing here"),
        ("run:\n  name: !!python/name:os.system", "line 2: the tag '.*python/name:os.system' means nothing here"),
        ("run: !!set {name}", "line 1: the tag '.*set' means nothing here"),
        ("a: *nobody", "is not valid YAML: line 1, column 4: "),
        ("<<: 3", "is not valid YAML: line 1, column "),
        ("[" * 5000, "nested too deeply"),
        ("a: " + "[" * 400 + "]" * 400, "nested too deeply|unknown key 'a'"),
        ("run: 3\nrun", "is not valid YAML: line "),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_no_configuration_is_said_in_one_line(write: Callable[[str], str], text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_config(write(text))
    assert "\n" not in str(error.value) and "given.yaml" in str(error.value)


def test_a_file_that_unfolds_to_billions_is_read_at_once(write: Callable[[str], str]) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 64))]
    with pytest.raises(ValueError, match="unknown key 'a0'"):
        load_config(write("\n".join(lines)))


@pytest.mark.parametrize("text", ["", "# nothing\n", "~", "---\n", "{}"])
def test_an_empty_file_is_an_empty_configuration(write: Callable[[str], str], text: str) -> None:
    assert load_config(write(text)) == load_config(write("strategy: circadian"))


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("run: {name: 001}", "name", "001"),
        ("run: {name: 1.10}", "name", "1.10"),
        ("run: {name: 0x1F}", "name", "0x1F"),
        ("run: {name: on}", "name", "on"),
        ("run: {name: True}", "name", "True"),
        ("run: {name: 12:30}", "name", "12:30"),
        ("run: {name: 2024-01-01}", "name", "2024-01-01"),
        ("run: {name: 'null'}", "name", "null"),
        ("run: {seed: 0123}", "seed", 123),
        ("run: {seed: 0x10}", "seed", 16),
        ("run: {seed: '7'}", "seed", 7),
        ("run: {seed: 1_000}", "seed", 1000),
        ("run: {lag: 1e-3}", "lag", 0.001),
        ("run: {lag: 2}", "lag", 2.0),
        ("run: {deterministic: TRUE}", "deterministic", True),
    ],
)
def test_a_file_is_read_as_its_keys_want_it(write: Callable[[str], str], text: str, key: str, value: Any) -> None:
    found = getattr(load_config(write(text)).run, key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run:\n  deterministic: yes", r"line 2: run\.deterministic: 'yes' is neither true nor false; .*=true$"),
        ("run: {deterministic: off}", r"run\.deterministic: 'off' is neither true nor false; .*=false$"),
        ("run: {seed: 1:30}", r"run\.seed: '1:30' is no whole number; give one, for instance run\.seed=16"),
        ("run: {name: ~}", r"run\.name: '~' is no single text"),
        ("run: {name: }", r"run\.name: '' is no single text"),
        ("run: {name: [a]}", r"run\.name: \['a'\] is no single text"),
        ("wake:\n\n  batch: 1e3", r"line 3: wake\.batch: '1e3' is no whole number"),
        ("run: {seed: 99999999999999999999}", r"run\.seed: '9+' is no whole number"),
        ("stream: {sources: docs}", r"stream\.sources: 'docs' is no list; give one, .* stream\.sources=\[name\]"),
        ("stream: {sources: [a, {b: 1}]}", r"stream\.sources\[1\] is a single value"),
        (
            "control: {learning_rates: [1e-3, true]}",
            r"control\.learning_rates\[1\]: 'true' is no number; .*=\[0\.001\]",
        ),
    ],
)
def test_a_value_that_is_not_of_its_keys_type_is_named_with_its_line(
    write: Callable[[str], str], text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_config(write(text))
    assert "given.yaml" in str(error.value) and "\n" not in str(error.value)


def test_what_pyyaml_writes_is_read_back() -> None:
    words = ["1e-3", "0123", "1:30", "on", "null", "~", "", "a b", "1.0", ".inf", "<<", "=", "!x", "&a", "# c", "a: b"]
    node = compose_any(yaml.safe_dump(words), "x")
    assert [item.value for item in node.value] == words
