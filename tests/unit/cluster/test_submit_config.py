"""What a job on a cluster gets: the folders that were meant here, the interpreter that is meant there."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from cluster.submit import _over_there, job_config
from pipelines.config.load import load_config


def test_a_job_has_the_folders_that_a_run_here_would_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    cfg = load_config("smoke", ["run.root=~/runs", "stream.path=texts", "ray.python=~/venv/bin/python"])
    job = job_config(cfg)
    assert cfg.run.root == job.run.root == str(tmp_path / "runs")
    assert job.stream.path == str(tmp_path / "texts")
    assert job.ray.python == "~/venv/bin/python", "a home over there"


@pytest.mark.parametrize(
    ("interpreter", "word"),
    [
        ("python", "python"),
        ("~/venv/bin/python", "/over/there/venv/bin/python"),
        ("~/my venv/python", "/over/there/my venv/python"),
        ("/a b/python; exit", "/a b/python; exit"),
        ("~", "~"),
        ("~/$(exit 1)", "/over/there/$(exit 1)"),
    ],
)
def test_the_interpreter_is_one_word_and_its_home_is_over_there(interpreter: str, word: str) -> None:
    command = f"printf %s {_over_there(interpreter)}"
    done = subprocess.run(
        ["sh", "-c", command], env={"HOME": "/over/there"}, capture_output=True, text=True, check=True
    )
    assert done.stdout == word
    assert shlex.split(command)[1:2] == ["%s"]
