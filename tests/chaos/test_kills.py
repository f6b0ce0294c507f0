"""SIGKILL to the driver, the learner, a pool rank or the experience service, at random moments, many times."""

from __future__ import annotations

import os
import random
import subprocess
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Dict, List, Tuple

import pytest

from pipelines.machine import trace
from tests.harness import TIMEOUT, Run, circadian, kill

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
SEED = int(os.environ.get("CHAOS_SEED", "20261122"))
TITLES = {"learner": "ray::OnlineLearner", "rank": "ray::ConsolidationWorker", "service": "ray::ExperienceService"}
COMMON = (
    "control.enabled=false",
    "dreams.share=0.0625",
    "failures.learner=40",
    "failures.pool=40",
    "failures.services=40",
    "wake.checkpoint_every=7",
)


@dataclass(frozen=True)
class Plan:
    """A run and the kills it has to take."""

    overrides: Tuple[str, ...]
    tokens: int
    """Length of its stream."""
    kills: Dict[str, int]


PLANS = {
    # The learner waits for the pool, so the stream lasts as long as the rounds do, and adoptions have fixed places.
    "paced": Plan(
        ("run.deterministic=true", "stream.max_source_bytes=32768"),
        65536,
        {"driver": 1, "learner": 3, "rank": 3, "service": 3},
    ),
    # Small batches: many commits, and a learner that runs ahead of a pool of one rank.
    "free": Plan(
        ("pool.ranks=1", "wake.batch=2", "stream.max_source_bytes=49152", "levels.slow.period=16384"),
        98304,
        {"driver": 1, "learner": 3, "rank": 3, "service": 3},
    ),
}


@dataclass
class Chaos:
    """Carries out kills one after the other, each some events of the journal after the one before.

    Counting events instead of seconds hits the same phases on a slow machine as on a fast one.
    """

    run: Run
    draw: random.Random
    left: List[str]
    hits: List[Tuple[str, str]] = field(default_factory=list)
    """(what was killed, the last event before)."""
    attempts: int = 0

    def finish(self) -> None:
        """Give the same command again and again until it ends by itself."""
        status = -9
        while status == -9:
            self.attempts += 1
            with self.run.attempt() as process:
                self._attempt(process)
                status = process.wait(TIMEOUT)
        assert status == 0, f"exit status {status} after {self.hits}:\n{self.run.tail()}"

    def _attempt(self, process: subprocess.Popen[bytes]) -> None:
        while self.left and process.poll() is None:
            wanted = len(self.run.events()) + self.draw.randint(1, 4)
            self.run.wait_until(process, partial(self.run.wrote, wanted))
            time.sleep(self.draw.uniform(0.0, 0.4))
            if process.poll() is None and self._strike(self.left[0], process):
                self.left.pop(0)

    def _strike(self, target: str, process: subprocess.Popen[bytes]) -> bool:
        """Kill one process of a kind; False where there is none now."""
        last = self.run.events()[-1]["event"]
        if target == "driver":
            process.kill()
            process.wait(30)
        else:
            victims = self.run.processes(TITLES[target])
            if not victims or not kill([self.draw.choice(victims)]):
                return False
        self.hits.append((target, last))
        return True


@pytest.mark.parametrize("name", PLANS)
def test_nothing_is_lost_or_doubled(runs: Path, name: str, tmp_path: Path) -> None:
    plan, draw = PLANS[name], random.Random(f"{SEED} {name}")
    kills = [target for target, number in plan.kills.items() for _ in range(number)]
    draw.shuffle(kills)
    run = Run(runs, f"chaos-{name}", (*COMMON, *plan.overrides))
    chaos, start = Chaos(run, draw, list(kills)), time.monotonic()
    try:
        chaos.finish()
    finally:
        print(f"CHAOS_SEED={SEED}: {len(chaos.hits)} kills in {chaos.attempts} attempts: {chaos.hits}")
    print(f"{time.monotonic() - start:.0f} s; restarted: {[event['part'] for event in run.events('failure')]}")
    assert not chaos.left, f"the run ended before these were killed: {chaos.left}"

    summary = run.summary()
    found = summary["experiences"]
    assert (found["lost"], found["duplicates"], found["quarantined"]) == (0, 0, 0)
    assert summary["tokens_streamed"] == plan.tokens == found["committed"] * 64
    assert summary["rows"][-1]["release"] >= 1
    assert trace.check_trace(run.directory / trace.FILE) == []
    verified = circadian("store", "verify", str(run.directory / "store"), cwd=tmp_path)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    # Ray's idle agents take a minute to notice that their driver was killed.
    assert run.wait_until_gone(90) == []


def test_there_are_enough_kills() -> None:
    assert sum(sum(plan.kills.values()) for plan in PLANS.values()) >= 20
