"""SIGTERM: what is learned is committed, the exit is clean and quick, and the same command resumes."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Callable, List, Tuple

import pytest

from tests.harness import TIMEOUT, Run

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
SEED = int(os.environ.get("CHAOS_SEED", "20261122"))
LIMIT = 3.0
"""Seconds from the signal to the end of the driver."""


def terminate(run: Run, reached: Callable[[], object], delay: float) -> float:
    """Start the run and ask it to stop `delay` seconds after something holds; returns the seconds until its exit."""
    with run.attempt() as process:
        assert run.wait_until(process, reached), run.tail()
        time.sleep(delay)
        assert process.poll() is None, "the run ended before it could be stopped"
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
        spent = time.monotonic() - start
    assert status == 0, f"exit status {status}:\n{run.tail()}"
    assert run.events()[-1]["event"] == "stopped"
    assert run.wait_until_gone(10) == []
    return spent


def test_it_stops_within_three_seconds_and_resumes(runs: Path) -> None:
    draw = random.Random(f"{SEED} sigterm")
    # A seed of its own, so that the base is not in the cache yet.
    small = ("pool.ranks=1", "control.enabled=false", "stream.max_source_bytes=24576")
    run = Run(runs, "sigterm", ("run.seed=11", "run.deterministic=true", *small))
    position = draw.randrange(1, 45_000)
    moments: List[Tuple[str, Callable[[], object]]] = [
        ("base", lambda: run.events("base_started")),
        (f"stream at {position}", partial(run.reached, position)),
    ]
    for name, reached in moments:
        delay = draw.uniform(0.0, 0.3)
        spent = terminate(run, reached, delay)
        print(f"CHAOS_SEED={SEED}: {name} + {delay:.2f} s: stopped within {spent:.2f} s")
        assert spent <= LIMIT, f"{spent:.1f} s from SIGTERM to exit ({name} + {delay:.1f} s)"
    assert run.finish() == 0, run.tail()
    summary = run.summary()
    found = summary["experiences"]
    assert (found["lost"], found["duplicates"]) == (0, 0)
    assert summary["tokens_streamed"] == 2 * 24576


def test_it_may_be_stopped_while_it_is_starting(runs: Path) -> None:
    draw = random.Random(f"{SEED} early")
    run = Run(runs, "early", ("control.enabled=false",))
    for _ in range(4):
        with run.attempt() as process:
            time.sleep(draw.uniform(0.1, 8.0))
            process.send_signal(signal.SIGTERM)
            status = process.wait(TIMEOUT)
        # Before the driver has taken the signal over, it simply ends.
        assert status in (0, -signal.SIGTERM), f"exit status {status}:\n{run.tail()}"
        assert run.wait_until_gone(10) == []
    assert "Traceback" not in run.tail()
