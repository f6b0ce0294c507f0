"""Cycle after cycle: what earlier sources lose. `python -m benchmarks.cycles --data DIR [--seeds N] [--json FILE]`.

Circadian lives through a stream in `--cycles` equal stretches, whatever sources these hold, and sleeps deeply after
each: what that leaves behind is scored, as it is what may go live. With `--nights` it lives through the stream as in a
trial, with one deep sleep at its end, and is scored `NIGHTS` times per source in between, while nights are still warm.

The forgetting of a source is how much worse it is than it was at best since it was learned; what counts is whether it
grows with the number of looks. That is fitted over the base's sources, which all of them can hurt: a mean over all
sources falls whenever a fresh one joins it. DIR holds NAME/train.txt and NAME/valid.txt.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import torch

from benchmarks.interleave import one_thread
from benchmarks.results import keep_page
from benchmarks.tables import Machine, markdown_table
from nl_model.weights import write_durably
from pipelines.compare.config import Night
from pipelines.compare.handover import HandoverTrainer
from pipelines.compare.material import Material, Segment, load_material, stream_of_folder
from pipelines.compare.names import head_of, lr_of, method_of
from pipelines.compare.statistics import slope
from pipelines.compare.trace import Trace
from pipelines.compare.trial import Workshop
from pipelines.config.checks import at_least
from pipelines.config.gate import GateConfig
from pipelines.config.load import load_config
from pipelines.gate.probe import Row, score

ORDERS = ("A", "reverse")
LR, EPOCHS = 4e-3, 2.0
"""Peak step size asleep, and FLOPs per stream token in plain steps, unless given."""
CYCLES, NIGHTS = 10, 16
"""Stretches of the stream; or looks at every source per source of the stream."""
LEAST_CYCLES = 4
"""Two in the second half, so that it has a slope."""
COLUMNS = 4
"""Looks that the page shows, beside the first."""


class Nightly(HandoverTrainer):
    """Scores every source `NIGHTS` times per streamed one (and not after merging and the deep sleep)."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.nights: List[Row] = []

    def run(self) -> Trace:
        """As a trial; `nights` begins with the base."""
        self._look()
        return super().run()

    def _live(self, segment: Segment, first: int, last: int, day: Tuple[int, int]) -> Sequence[int]:
        trained = super()._live(segment, first, last, day)
        if (day[0] + 1) * NIGHTS // day[1] > day[0] * NIGHTS // day[1]:
            self._look()
        return trained

    def _look(self) -> None:
        material = self.material
        found = score(self.model, material.probes, material.sources, material.cfg.compute.precision)
        self.nights.append(Row(len(self.nights), self.position, found))


def in_cycles(material: Material, number: int) -> Material:
    """The stream in equal stretches of whole batches, across the boundaries of its sources."""
    every, batch = material.segments, material.cfg.sleep.batch
    tokens_NS, sources_N, bytes_N = (
        np.concatenate([getattr(segment, key) for segment in every]) for key in ("tokens_NS", "sources_N", "bytes_N")
    )
    cuts = [round(i * len(tokens_NS) / number / batch) * batch for i in range(number)] + [len(tokens_NS)]
    if min(np.diff(cuts)) < 1:
        raise ValueError(
            f"--cycles {number} is more than the {len(tokens_NS)} sequences of this stream fill; use fewer"
        )
    parts = [slice(*cut) for cut in itertools.pairwise(cuts)]
    stretches = [Segment(f"cycle {i}", tokens_NS[p], sources_N[p], bytes_N[p]) for i, p in enumerate(parts, start=1)]
    return replace(material, segments=stretches)


@dataclass(frozen=True)
class Life:
    """One run: what every source had forgotten at each look (after a cycle, or a night), in bits per byte."""

    order: str
    seed: int
    looks: int
    forgotten: Dict[str, List[float]]
    """By source, from the look after it was learned on; 0 is the best so far."""
    worst: List[float]
    """The largest of them at each look."""
    base: List[float]
    """Their mean over the base's sources at each look."""
    final: float
    """The largest of them when the stream has ended, behind the deep sleep."""
    mean: float
    """Bits per byte over all sources then."""
    rejected: int


def read(rows: Sequence[Row], material: Material) -> Tuple[Dict[str, List[float]], List[float], List[float]]:
    """Forgetting by source since it was learned, its largest over all sources, and its mean over the base's.

    Rows are the base's and then one per look.
    """
    T, forgotten = material.cfg.model.context, {}
    known: List[List[float]] = [[] for _ in rows]
    for source in material.sources:
        end = material.ends.get(source, 0)
        first = next(i for i, row in enumerate(rows) if row.tokens + T >= end)
        best, series = rows[first].bpb[source], []
        for i in range(first + 1, len(rows)):
            series.append(rows[i].bpb[source] - best)
            known[i].append(series[-1])
            best = min(best, rows[i].bpb[source])
        forgotten[source] = series
    base = np.mean([forgotten[source] for source in material.base_sources], axis=0).tolist()
    return forgotten, [max(values) for values in known[1:]], base


def night_of(name: str, deep: bool = True) -> Night:
    """Circadian's settings with the changes that the name makes. deep: a deep sleep is to end every cycle.

    Raises:
        ValueError: it is no `circadian`, sets a step size, leaves nothing handed over, or no deep sleep after a cycle.
    """
    if head_of(name) != "circadian" or lr_of(name) is not None:
        raise ValueError(f"--method {name!r} must be circadian[:SETTING=VALUE...]; give step sizes with --lr")
    night = method_of(name).night
    if not night.handover:
        raise ValueError(f"--method {name!r} leaves nothing handed over; set handover above 0")
    if deep and not night.bank:
        raise ValueError(f"--method {name!r} leaves no deep sleep, which ends every cycle; set bank above 0")
    return night


def live(
    material: Material, shop: Workshop, order: str, seed: int, cycles: int, spending: Tuple[float, float], night: Night
) -> Life:
    """One run through the stream. cycles: stretches, each with its deep sleep; 0: as a trial, looked at every night.

    spending: step size asleep, and FLOPs per stream token in plain steps.
    """
    torch.manual_seed(seed)
    weights = shop.base(material, seed, scratch=False)
    shared = (*spending, float("inf"), seed, weights, shop.device)
    if cycles:
        often = replace(night, deep_every=1)
        trainer = HandoverTrainer(in_cycles(material, cycles), often, *shared)
        rows = trainer.run().rows
        every = rows
    else:
        trainer = Nightly(material, night, *shared)
        last = trainer.run().rows[-1]
        rows, every = trainer.nights, [*trainer.nights, last]
    forgotten, worst, base = read(rows, material)
    _, final, _ = read(every, material)
    mean = float(np.mean(list(every[-1].bpb.values())))
    return Life(order, seed, len(worst), forgotten, worst, base, final[-1], mean, trainer.rejected)


def summary(lives: Sequence[Life], budget: float) -> Dict[str, Any]:
    """Slopes per look with 95 % intervals, by order, and the largest forgetting against the gate's budget."""
    found: Dict[str, Any] = {
        "budget": budget,
        "largest": max(max(life.worst) for life in lives),
        "final": max(life.final for life in lives),
    }
    for order in ORDERS:
        mine = [life for life in lives if life.order == order]
        curve = np.mean([life.base for life in mine], axis=0).tolist()
        since = {
            source: slope(np.mean([life.forgotten[source] for life in mine], axis=0).tolist())
            for source, series in mine[0].forgotten.items()
            if len(series) > 1
        }
        found[order] = {"base": slope(curve), "second_half": slope(curve[len(curve) // 2 :]), "since": since}
        found[order]["curve"] = curve
    flat = all(found[order]["base"]["low"] <= 0 for order in ORDERS)
    found["met"] = found["largest"] <= budget and flat
    return found


def render(lives: Sequence[Life], found: Dict[str, Any], material: Material, what: str, lr: float) -> str:
    """Markdown: forgetting look by look, and whether it grows. what: a look's name. lr: peak step size asleep."""
    length = min(len(life.worst) for life in lives)
    columns = sorted({round(i * (length - 1) / COLUMNS) for i in range(COLUMNS + 1)})
    rows = []
    for life in lives:
        cells = [f"{life.base[i]:+.3f} / {life.worst[i]:+.3f}" for i in columns]
        rows.append(
            [
                life.order,
                str(life.seed),
                str(life.looks),
                str(life.rejected),
                *cells,
                f"{life.final:+.3f}",
                f"{life.mean:.3f}",
            ]
        )
    head = [
        "order",
        "seed",
        f"{what}s",
        "rejected",
        *(f"{what} {i + 1}" for i in columns),
        "at the end",
        "bits per byte",
    ]
    lines = [
        f"Sources {', '.join(material.sources)}; step size {lr:g}. Each cell: forgetting of the base's sources, mean / "
        "of the source that fares worst, in bits per byte against the best figure so far; negative: better than ever. "
        "At the end: the worst source behind the last deep sleep, and the mean over all sources.",
        markdown_table(head, rows),
        f"Largest after any {what}: {found['largest']:+.3f}; at the end: {found['final']:+.3f}; the gate's budget (its "
        f"default) is {found['budget']:g}.",
    ]
    for order in ORDERS:
        since = ", ".join(f"{name} {fit['slope']:+.4f}" for name, fit in found[order]["since"].items())
        lines.append(
            f"* order {order}: the base's mean forgetting changes by {_fit(found[order]['base'])} per {what}, over the "
            f"second half by {_fit(found[order]['second_half'])}; each source since it was learned: {since}"
        )
    return "\n\n".join(lines)


def _fit(found: Dict[str, float]) -> str:
    return f"{found['slope']:+.4f} (95 % {found['low']:+.4f} .. {found['high']:+.4f})"


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cycles", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="key=value on top of the micro preset")
    parser.add_argument("--data", required=True, help="folder of NAME/train.txt and NAME/valid.txt")
    parser.add_argument("--stream", default="play,code_c,law_de", help="sources to learn, in order A")
    parser.add_argument("--base", default="wiki,math", help="the sources that are known already")
    parser.add_argument("--seeds", type=int, default=3)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--cycles", type=int, default=CYCLES, help="stretches of the stream, each with its deep sleep")
    kind.add_argument("--nights", action="store_true", help="look at warm nights instead, as in a trial")
    parser.add_argument("--lr", type=float, default=LR, help="peak step size asleep")
    parser.add_argument("--epochs", type=float, default=EPOCHS, help="FLOPs per stream token, in plain steps")
    parser.add_argument("--method", default="circadian", help="circadian, or with settings as circadian:merge=0.2")
    parser.add_argument("--work", type=Path, help="folder that keeps bases between runs")
    parser.add_argument("--json", type=Path, help="also write {summary, lives} to this file")
    args = parser.parse_args()
    at_least("--lr", args.lr, 1e-9)
    at_least("--epochs", args.epochs, 1.0)
    cycles, what = (0, "night") if args.nights else (args.cycles, "cycle")
    night = night_of(args.method, bool(cycles))
    at_least("--cycles", args.cycles, LEAST_CYCLES)
    overrides = [*stream_of_folder([f"stream.path={args.data}"]), f"stream.sources=[{args.stream}]"]
    cfg = load_config("default", [*overrides, f"base.sources=[{args.base}]", *args.overrides], "micro")
    lives = []
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        shop = Workshop(args.work or Path(folder), cfg)
        for order in ORDERS:
            material = load_material(cfg, order)
            in_cycles(material, max(1, cycles))  # a clear error before a base is pretrained
            for seed in range(args.seeds):
                lives.append(live(material, shop, order, seed, cycles, (args.lr, args.epochs), night))
                print(f"order {order}, seed {seed}: {' '.join(f'{x:+.2f}' for x in lives[-1].worst)}", flush=True)
    found = summary(lives, GateConfig().max_forgetting)
    page = render(lives, found, material, what, args.lr)
    print(page)
    if args.json:
        payload = {"summary": found, "lives": [asdict(life) for life in lives], "machine": Machine.here().show()}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_durably(args.json, (json.dumps(payload, indent=1) + "\n").encode())
        command = f"python -m benchmarks.cycles --data DIR --stream {args.stream} --base {args.base}"
        mode = ("--nights" if args.nights else f"--cycles {args.cycles}") + f" --method {args.method}"
        plan = [f"--lr {args.lr:g}", f"--epochs {args.epochs:g}", f"--seeds {args.seeds}"]
        keep_page(args.json, " ".join([command, mode, *plan, *args.overrides]), page)


if __name__ == "__main__":
    main()
