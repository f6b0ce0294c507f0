"""Random schedules of the run's machine in simulated time: `python -m tests.chaos.machine --schedules 10000`.

Each schedule is a world, rules, speeds and faults drawn from one seed: slow pools, dying parts, late answers, stops,
crashes between any two actions. The same command is given again until the run is finished; then nothing may be lost or
done twice (tests/unit/pipelines/machine/properties.py). A violation names its seed: `--first SEED --schedules 1`.
"""

from __future__ import annotations

import argparse
import time

from tests.unit.pipelines.machine.properties import Counted, Schedule, check_schedule


def run_schedules(count: int, first: int = 0) -> Counted:
    """Check schedules of seeds first, first + 1, ...; AssertionError with the seed where a property does not hold."""
    counted = Counted()
    for seed in range(first, first + count):
        try:
            check_schedule(Schedule.of(seed), counted)
        except Exception as error:
            raise AssertionError(f"schedule {seed}: {type(error).__name__}: {error}") from error
    return counted


def main() -> None:
    """Run, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    given = parser.parse_args()
    start = time.perf_counter()
    counted = run_schedules(given.schedules, given.first)
    print(counted.line(time.perf_counter() - start))


if __name__ == "__main__":
    main()
