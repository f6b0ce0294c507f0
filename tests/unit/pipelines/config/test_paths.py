"""Paths: `~` is a home folder wherever a path may stand, and means the same to whoever reads the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.compare.data import stream_of_folder
from pipelines.config.documentation import every_key
from pipelines.config.load import load_config, to_yaml
from pipelines.config.paths import from_home
from pipelines.data.corpus import open_corpus

KEYS = ("run.root", "stream.path", "base.checkpoint", "tokenizer.path", "tracking.uri")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("key", KEYS)
def test_a_home_is_written_out_in_files_and_on_the_command_line(key: str, home: Path, tmp_path: Path) -> None:
    section, name = key.split(".")
    path = tmp_path / "given.yaml"
    path.write_text(f"{section}: {{{name}: ~/a b}}")
    for config in (load_config("smoke", [f"{key}=~/a b"]), load_config(str(path))):
        assert value(config, key) == f"{home}/a b"
        path.write_text(to_yaml(config))
        assert load_config(str(path)) == config
    assert value(load_config("smoke", [f"{key}=x/~/y"]), key) == "x/~/y"


def test_every_key_that_holds_a_path_is_among_them() -> None:
    words = ("directory", "folder", "tokenizer.json", "database")
    about = {
        key.name for key in every_key() if key.kind in (str, str | None) and any(w in key.doc.lower() for w in words)
    }
    assert about | {"stream.path"} >= set(KEYS) and about <= {*KEYS, "run.name"}


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("~", "{home}"),
        ("~/x", "{home}/x"),
        ("./~/x", "./~/x"),
        ("x~", "x~"),
        ("", ""),
        (None, None),
        ("~root", "/root"),
    ],
)
def test_only_a_home_at_the_start_is_one(path: Any, found: Any, home: Path) -> None:
    assert from_home("run.root", path) == (found and found.format(home=home))


def test_the_home_of_nobody_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"run\.root='~nobody-here/x' begins with the home of a user .*\./~nobody-here/x"
    ):
        load_config("smoke", ["run.root=~nobody-here/x"])


def test_a_database_in_a_home_is_found(home: Path) -> None:
    uri = load_config("smoke", ["tracking.uri=sqlite:///~/mlflow.db"]).tracking.uri
    assert uri == f"sqlite:///{home}/mlflow.db"
    assert load_config("smoke", ["tracking.uri=http://host/~me"]).tracking.uri == "http://host/~me"


def test_a_folder_whose_name_begins_with_a_tilde_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "~texts"
    folder.mkdir()
    (folder / "a.txt").write_text("some words\n" * 4000)
    assert open_corpus(load_config("smoke", ["stream.path=./~texts", "stream.sources=[]", "base.sources=[]"]).stream)


def test_a_comparison_looks_into_the_home_as_well(home: Path) -> None:
    (home / "texts" / "a").mkdir(parents=True)
    (home / "texts" / "a" / "train.txt").write_text("x")
    assert stream_of_folder(["stream.path=~/texts", "run.name=~/x"]) == [
        f"stream.path={home}/texts/*/[tv][ra]*.txt",
        "run.name=~/x",
    ]
