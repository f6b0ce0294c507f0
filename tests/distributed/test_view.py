"""A run whose reader goes away trains to its end."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import TIMEOUT, Run, environment

pytestmark = pytest.mark.timeout(400)


def test_a_closed_pipe_does_not_end_the_run(runs: Path) -> None:
    run = Run(runs, "piped", ("control.enabled=false", "pool.ranks=1"))
    command = shlex.join([sys.executable, "-m", "cluster.cli", *run.arguments()])
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -2; exit ${{PIPESTATUS[0]}}"],
        env={**environment(), "PYTHONIOENCODING": "ascii"},
        cwd=run.cwd,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 and "Traceback" not in done.stderr
    (told,) = run.events("view_off")
    assert "Broken pipe" in told["reason"]
    assert run.summary()["tokens_streamed"] == 24576 and run.events()[-1]["event"] == "finished"
