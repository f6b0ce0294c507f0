"""A stop asked for at a bad moment: it is neither lost nor printed as an error. Real signals, real processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.harness import ROOT, environment

pytestmark = pytest.mark.timeout(120)

PROGRAM = """
import os, signal, sys, time
from cluster.driver.run import Signals

signals = Signals()
if sys.argv[1] == "ray":  # while Ray connects, the handler is Ray's, and it does this
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))

class Late:
    def __init__(self, number):
        self.number = number
    def __del__(self):
        if not self.number:
            raise ValueError("a finalizer of ours that is broken")
        os.kill(os.getpid(), self.number)
        for _ in range(1000):
            pass

late = Late(0)
del late
late = Late(getattr(signal, sys.argv[2]))
del late
print("went on", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("handler", "number"), [("ours", "SIGTERM"), ("ours", "SIGINT"), ("ray", "SIGTERM")])
def test_a_stop_that_a_finalizer_swallows_still_ends_the_process_and_prints_no_error(handler: str, number: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, handler, number],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == (130 if number == "SIGINT" else 0), done.stderr
    assert done.stdout == "went on\n", "the finalizer did not swallow it"
    assert "a finalizer of ours that is broken" in done.stderr, "other errors of finalizers must be reported"
    assert done.stderr.count("Traceback") == 1, done.stderr
