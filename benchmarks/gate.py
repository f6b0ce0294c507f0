"""The gate against planted bad candidates and against honest ones. `python -m benchmarks.gate [--json FILE]`.

Honest candidates come from real rounds of small runs with different seeds and sources; bad ones are honest ones that
something happened to, in memory or on disk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Iterator, Sequence, Tuple

import torch

from benchmarks.honest import HonestRun
from benchmarks.planted import PLANTS, judge_planted
from benchmarks.results import command_line, keep_page
from benchmarks.tables import Machine, markdown_table
from pipelines.config.load import load_config
from pipelines.config.schema import Config
from pipelines.gate.decision import Decision

SOURCES = ("cpp", "unicode", "javascript", "fonts")
OVERRIDES = (
    "levels.slow.width=96",
    "levels.slow.period=16384",
    "wake.batch=8",
    "stream.max_source_bytes=32768",
    "stream.probe_bytes=2048",
    "base.batch=4",
    "base.tokens=204800",
    "base.lr=5e-3",
    "sleep.tokens_per_token=2.0",
    "strategy=cold_rounds",
)
"""The smoke configuration's model with a base long enough (800 steps) for every layer to matter, and rounds of 64 steps
and more, each cooled down by itself: a candidate is then what its round made of it."""


@dataclass(frozen=True)
class Case:
    """One candidate and what became of it."""

    kind: str
    """honest, or the kind of a planted one."""
    seed: int
    sources: str
    round: int
    promoted: bool
    check: str
    """The check that failed; empty where none did."""
    reason: str
    worst: float
    """Largest loss on a source seen, in bits per byte; NaN where it is not finite."""
    divergence: float
    """From the anchor on prompts of older sources, in nats per token; 0 where that was not looked at."""


def case(kind: str, run: HonestRun, number: int, decision: Decision) -> Case:
    """A decision in short."""
    checks = decision.figures["checks"]
    failed = "" if decision.promoted else checks[-1]["name"]
    divergence = next((c["figures"]["mean"] for c in checks if c["name"] == "divergence"), 0.0)
    sources = " ".join(run.setting.stream_sources)
    worst = float(decision.figures["worst"]["loss"])
    return Case(kind, run.cfg.run.seed, sources, number, decision.promoted, failed, decision.reason, worst, divergence)


def small_config(seed: int, overrides: Sequence[str] = OVERRIDES) -> Config:
    """A small run with its own seed and its own two sources in its own order."""
    orders = list(itertools.permutations(SOURCES, 2))
    sources = ",".join(orders[(5 * seed) % len(orders)])
    return load_config("smoke", [*overrides, f"run.seed={seed}", f"stream.sources=[{sources}]"])


def measure(candidates: int, configs: Iterator[Config], kinds: Sequence[str] = tuple(PLANTS)) -> Iterator[Case]:
    """So many honest candidates and so many planted ones, from as many runs as it takes.

    Every night's candidate is judged as it is. From the second night on, when there is an earlier release to go back
    to, two planted ones are made of it first; kinds take turns.
    """
    honest = planted = 0
    while min(honest, planted) < candidates:
        with tempfile.TemporaryDirectory() as folder:
            run = HonestRun(next(configs), Path(folder))
            while run.wake() and min(honest, planted) < candidates:
                found = run.sleep()
                for _ in range(2 if run.live else 0):
                    if planted < candidates:
                        kind, planted = kinds[planted % len(kinds)], planted + 1
                        yield case(kind, run, run.round, judge_planted(run, found, PLANTS[kind], planted))
                decision = run.night(found)
                if honest < candidates:
                    honest += 1
                    yield case("honest", run, run.round, decision)


def blocked(cases: Sequence[Case]) -> Tuple[int, int, int, int]:
    """(planted blocked, planted, honest blocked, honest)."""
    planted, honest = ([c for c in cases if (c.kind == "honest") == side] for side in (False, True))
    return sum(not c.promoted for c in planted), len(planted), sum(not c.promoted for c in honest), len(honest)


def render(cases: Sequence[Case]) -> str:
    """The tables of the page."""
    stopped, planted, refused, honest = blocked(cases)
    head = f"Planted bad candidates blocked: {stopped} of {planted}. Honest candidates blocked: {refused} of {honest}."
    rows = []
    for kind in dict.fromkeys(c.kind for c in cases):
        group = [c for c in cases if c.kind == kind]
        checks = Counter(c.check or "none" for c in group)
        told = ", ".join(f"{name} {count}" for name, count in sorted(checks.items()))
        rows.append([kind, str(len(group)), str(sum(not c.promoted for c in group)), told])
    return f"{head}\n\n{markdown_table(['candidate', 'number', 'blocked', 'by check'], rows)}"


def main() -> None:
    """Measure, print the table, and write JSON and page where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--candidates", type=int, default=50, help="of each side")
    parser.add_argument("--kinds", default="", help="comma-separated kinds of planted ones; empty: all")
    parser.add_argument("--json", type=Path, help="file for the figures; the page is laid beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start, cases = time.perf_counter(), []
    kinds = arguments.kinds.split(",") if arguments.kinds else list(PLANTS)
    unknown = sorted(set(kinds) - set(PLANTS))
    if unknown:
        raise SystemExit(f"--kinds: {unknown[0]!r} is unknown; use some of {', '.join(PLANTS)}")
    for found in measure(arguments.candidates, (small_config(seed) for seed in itertools.count()), kinds):
        cases.append(found)
        word = "promoted" if found.promoted else f"blocked by {found.check}: {found.reason}"
        print(f"{found.kind} (seed {found.seed}, round {found.round}): {word}", flush=True)
    print(render(cases))
    print(f"{time.perf_counter() - start:.0f} s on {Machine.here().show()}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        keys = ("planted_blocked", "planted", "honest_blocked", "honest")
        figures = dict(zip(keys, blocked(cases), strict=True))
        payload = {**figures, "command": command_line(), "overrides": OVERRIDES, "cases": [asdict(c) for c in cases]}
        arguments.json.write_text(json.dumps(payload, indent=1) + "\n")
        keep_page(arguments.json, render(cases))


if __name__ == "__main__":
    main()
