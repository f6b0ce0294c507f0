"""The machine under random schedules: nothing is lost or done twice, and planted bugs are seen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import List, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.machine.actions import Action
from pipelines.machine.events import Event
from pipelines.machine.faults import Faults
from pipelines.machine.simulated import Simulation
from pipelines.machine.trace import FILE, Trace, check_trace
from tests.chaos.machine import run_schedules
from tests.unit.pipelines.machine.planted import PLANTED
from tests.unit.pipelines.machine.properties import Schedule, check_schedule

SCHEDULES = 1_500
KINDS = ("learner", "pool", "publish", "services", "stop", "crash")


def test_random_schedules() -> None:
    counted = run_schedules(SCHEDULES)
    assert counted.schedules == SCHEDULES
    print(counted.line(0.0))
    for kind in ("crashed", "gave up", "stopped", "finished"):
        assert counted.ends[kind] > SCHEDULES // 10, f"too few attempts {kind}: {counted.ends}"
    for kind in KINDS:
        assert counted.faults[kind] > SCHEDULES // 20, f"too few faults of {kind}: {counted.faults}"
    assert counted.merged > SCHEDULES // 10, "the pool is never slow"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    base=st.integers(0, 400),
    seed=st.integers(0, 1_000),
    chances=st.fixed_dictionaries({kind: st.sampled_from((0.0, 0.05, 0.5)) for kind in KINDS}),
    late=st.sampled_from((0.0, 1.0)),
    most=st.integers(1, 12),
)
def test_searched_schedules(base: int, seed: int, chances: dict[str, float], late: float, most: int) -> None:
    """Hypothesis looks for a schedule that breaks a property, and makes it small."""
    check_schedule(replace(Schedule.of(base), faults=Faults(seed, **chances, late=late, most=most)))


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(name: str) -> None:
    machine, driver = PLANTED[name]
    for seed in range(200):
        try:
            check_schedule(Schedule.of(seed), None, machine, driver)
        except (AssertionError, RuntimeError, ValueError, KeyError) as error:
            print(f"{name}: schedule {seed}: {type(error).__name__}: {error}")
            return
    pytest.fail(f"200 schedules did not see {name}")


def test_without_faults_a_schedule_has_one_attempt() -> None:
    for seed in range(40):
        run = check_schedule(replace(Schedule.of(seed), faults=Faults()))
        assert run.attempts == 1


def test_a_deterministic_run_comes_to_the_same_rounds_whatever_fails() -> None:
    told = 0
    for seed in range(80):
        schedule = Schedule.of(seed)
        rules, world = replace(schedule.rules, deterministic=True), replace(schedule.world, extra=0.0)
        schedule = replace(schedule, rules=rules, world=world)  # marks closer than a period may merge, as time has it
        undisturbed = check_schedule(replace(schedule, faults=Faults()))
        run = check_schedule(schedule)
        told += run.attempts > 1
        assert run.saved.rounds == undisturbed.saved.rounds
        assert run.saved.rows == undisturbed.saved.rows
    assert told > 40


class Traced(Simulation):
    """A driver that writes its trace."""

    path: Path

    def attempt(self, limit: int = 1_000_000) -> Action | None:
        self.trace: Trace | None = None
        return super().attempt(limit)

    def _handle(self, event: Event) -> Sequence[Action]:
        if self.trace is None:
            self.trace = Trace(self.path, self.machine)
        actions = super()._handle(event)
        self.trace.add(event, actions)
        return actions


def test_a_trace_is_proved_by_a_fresh_machine(tmp_path: Path) -> None:
    lines: List[str] = []
    path = tmp_path / Path(FILE).name
    for seed in range(12):
        check_schedule(Schedule.of(seed), None, kind=type("Here", (Traced,), {"path": path}))
    assert check_trace(path) == []
    lines = path.read_text().splitlines()
    assert len(lines) > 500
    place = max(number for number, line in enumerate(lines) if '"kind": "StartRound"' in line)
    entry = json.loads(lines[place])
    entry["actions"] = [action for action in entry["actions"] if action["kind"] != "StartRound"] + entry["actions"]
    path.write_text("\n".join([*lines[:place], json.dumps(entry), *lines[place + 1 :]]))
    (wrong,) = check_trace(path)
    assert wrong.startswith(f"line {place + 1}: ") and "StartRound" in wrong
