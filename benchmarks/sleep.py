"""Sleep on ranks: speed by ZeRO stage, guides, bytes moved, and how it would scale. `python -m benchmarks.sleep`."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Dict, List

import numpy as np

from benchmarks import sleep_ranks
from benchmarks.interleave import clock, one_thread
from benchmarks.results import keep_page
from benchmarks.scaling import Cadence, Costs, Point, curve, fit_link, sleep_step
from benchmarks.sleep_ranks import AWAKE, BESIDE, PARALLEL, PLAIN, UNGUIDED, Ranks, Task
from benchmarks.tables import Machine, Spread, markdown_table
from benchmarks.traffic import file_bytes
from cluster.storage.releases import Release, Releases, load_release, shards_fingerprint, write_shard
from nl_model.model import NestedLM, resolve_device
from nl_model.weights import join, parameters_of, save_tensors
from pipelines.config.load import load_config
from pipelines.config.schema import Config
from pipelines.data.tokens import Tokenizer, build_tokenizer
from pipelines.experience import ExperienceStore, Record, Snapshot
from pipelines.sleep.guides import GuideCosts, measure_guides
from pipelines.sleep.plan import num_steps

LEAST_SAVING = 20.0
"""Bytes of data-parallel training by those between learner and pool, at least."""
SIZES = (2, 10, 100, 1000)
GUIDED = 64
"""Sequences whose guides are measured."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one round, by the kernel's counters."""

    steps: int
    """Sleep steps of the round."""
    to_pool: int
    """Written by the learner: experience of a period and the fast snapshot."""
    to_learner: int
    """Read by the learner: the release that it adopts."""
    adoption_seconds: float
    data_parallel: float
    """Sent and received by one of two data-parallel ranks in as many steps."""
    pool: Dict[str, float]
    """Sent and received by one of two ranks of the pool in the round, by ZeRO stage."""

    @property
    def saving(self) -> float:
        """How many times less moves between learner and pool than between two data-parallel ranks."""
        return self.data_parallel / (self.to_pool + self.to_learner)


@dataclass(frozen=True)
class Figures:
    """Everything that was measured, and what it says about more nodes."""

    cfg: Config
    task: Task
    ranks: Dict[int, Ranks]
    guides: GuideCosts
    traffic: Traffic
    costs: Costs
    cadence: Cadence
    predicted: Dict[str, float]
    """Wall seconds per step on two ranks that the model of scaling gives, by way."""
    scaling: List[Point]

    def as_json(self) -> Dict[str, Any]:
        """Everything that people may want to plot."""
        return {
            "ratios": {w: {name: rate.ratio.median for name, rate in r.rates.items()} for w, r in self.ranks.items()},
            "ranks": {world: asdict(ranks) for world, ranks in self.ranks.items()},
            "guides": {**asdict(self.guides), "visits_to_pay": self.guides.visits_to_pay},
            "traffic": {**asdict(self.traffic), "saving": self.traffic.saving, "required": LEAST_SAVING},
            "model": {"costs": asdict(self.costs), "cadence": asdict(self.cadence), "predicted": self.predicted},
            "scaling": [
                {**asdict(point), "keeps_up": point.keeps_up, "sustained": point.sustained} for point in self.scaling
            ],
            "machine": asdict(Machine.here()),
        }


def measure(cfg: Config, repeats: int = 5, steps: int = 2, worlds: Sequence[int] = (1, 2)) -> Figures:
    """Measure on one and on more ranks of this machine; the last number of ranks is the one that links are fitted to.

    Raises:
        ValueError: repeats < 1, or not 1 and at least one larger number of ranks.
    """
    if not worlds or worlds[0] != 1 or worlds[-1] < 2:
        raise ValueError(f"worlds={list(worlds)} must be 1 and larger numbers, ascending")
    recent = cfg.pool_period // cfg.model.context
    share = max(2, cfg.sleep.batch // max(worlds))
    task = Task(cfg, share, repeats, steps, num_steps(cfg.sleep, 0, recent - 1))
    ranks = {}
    for world in worlds:
        print(f"{world} ranks ...", flush=True)
        ranks[world] = sleep_ranks.measure(task, world)
    print("guides, and what learner and pool hand over ...", flush=True)
    with tempfile.TemporaryDirectory(prefix="sleep-bench-") as folder, one_thread():
        bench = Handover(cfg, Path(folder))
        guides = bench.guides()
        most = ranks[worlds[-1]]
        traffic = bench.traffic(task.round_steps, most.moved)
    costs = costs_of(cfg, ranks[1], most, traffic, share)
    cadence = cadence_of(cfg, share)
    ways = [f"ZeRO {stage}" for stage in task.stages]
    predicted = {way: predict(costs, ranks[1], most, way, cadence) for way in ways}
    return Figures(cfg, task, ranks, guides, traffic, costs, cadence, predicted, curve(costs, cadence, SIZES))


def costs_of(cfg: Config, one: Ranks, most: Ranks, traffic: Traffic, share: int) -> Costs:
    """What the model of scaling is fed with: wall seconds of one rank, and the link between several."""
    tokens, way = share * cfg.model.context, f"ZeRO {cfg.pool.zero_stage}"
    with_fast = NestedLM(cfg.model, cfg.levels, build_tokenizer(cfg.tokenizer, []).vocab_size)
    sizes = {name: p.nbytes for name, p in with_fast.named_parameters()}
    fast = sum(sizes[name] for name in with_fast.owned_by("learner"))
    return Costs(
        wake=one.seconds[AWAKE].median / tokens,
        full=one.seconds[PLAIN + UNGUIDED].median / tokens,
        sleep=one.seconds[way].median / tokens,
        weights=float(sum(sizes.values())),
        fast=float(fast),
        release=float(traffic.to_learner),
        adoption=traffic.adoption_seconds,
        link=fit_link(most.reductions, most.world),
        parts=parts_of(most, way),
        calls=most.calls[way],
    )


def predict(costs: Costs, one: Ranks, most: Ranks, way: str, cadence: Cadence) -> float:
    """Seconds that a step takes on several ranks of this machine, from one rank's and what was measured of talk."""
    alone = most.crowding * one.seconds[way].median / cadence.sleep_tokens
    own = replace(costs, sleep=alone, parts=parts_of(most, way), calls=most.calls[way])
    return sleep_step(own, most.world, cadence.sleep_tokens)


def parts_of(most: Ranks, way: str) -> float:
    """Halves of an all-reduce of all gradients that a way's bytes amount to, by the counters."""
    return 2 * most.moved[way] / most.moved[PARALLEL]


def cadence_of(cfg: Config, share: int) -> Cadence:
    """The configuration's periods."""
    fast = min(level.period for level in cfg.levels.values() if level.owner == "learner")
    context = cfg.model.context
    return Cadence(cfg.wake.batch * context, fast, cfg.pool_period, share * context, cfg.sleep.tokens_per_token)


class Handover:
    """What goes from learner to pool and back, on disk, as in a run."""

    def __init__(self, cfg: Config, folder: Path) -> None:
        self.cfg, self.folder = cfg, folder
        self.device = resolve_device(cfg.compute.device)
        self.tokenizer: Tokenizer = build_tokenizer(cfg.tokenizer, [])
        self.model = NestedLM(cfg.model, cfg.levels, self.tokenizer.vocab_size).reset_parameters(cfg.run.seed)

    def guides(self) -> GuideCosts:
        """Guides computed at every visit against guides stored once."""
        snapshot = self._experience(GUIDED, "guided")
        clock_here = lambda: clock(self.device)  # noqa: E731
        rows, batch = np.arange(GUIDED), self.cfg.sleep.batch
        return measure_guides(
            self.model.to(self.device),
            snapshot,
            rows,
            self.cfg.sleep.top_k,
            self.folder,
            batch=batch,
            precision=self.cfg.compute.precision,
            clock=clock_here,
        )

    def traffic(self, steps: int, moved: Dict[str, float]) -> Traffic:
        """Bytes between learner and pool in one round, counted while it is handed over.

        Args:
            steps: sleep steps of the round.
            moved: bytes per rank in as many steps, by way.
        """
        model, start = self.model.cpu(), file_bytes()[0]
        self._experience(self.cfg.pool_period // self.cfg.model.context, "stream")
        fast = parameters_of(model, "learner")
        save_tensors(self.folder / "fast.safetensors", fast)
        to_pool = file_bytes()[0] - start
        releases = Releases(self.folder / "releases")
        weights = {name: p.detach() for name, p in model.named_parameters()}
        shards = [write_shard(releases.prepare(1), 0, 1, join(weight=weights, offset=fast))]
        releases.publish(Release(1, 0, 1, 1, 0, 0, shards_fingerprint(shards), shards))
        read, begun = file_bytes()[1], time.perf_counter()
        load_release(releases.directory(1))
        seconds = time.perf_counter() - begun
        pool = {name: size for name, size in moved.items() if name != PARALLEL}
        return Traffic(steps, to_pool, file_bytes()[1] - read, seconds, moved[PARALLEL], pool)

    def _experience(self, rows: int, name: str) -> Snapshot:
        """A store of random experience, committed a wake step at a time."""
        cfg, rng = self.cfg, np.random.default_rng(self.cfg.run.seed)
        size, path = cfg.model.context + 1, self.folder / name
        with ExperienceStore.open(path, cfg.model.context, self.tokenizer.dtype, cfg.store) as store:
            for start in range(0, rows, cfg.wake.batch):
                keys = range(start, min(rows, start + cfg.wake.batch))
                draws = rng.integers(0, self.tokenizer.vocab_size, (len(keys), size)).astype(self.tokenizer.dtype)
                store.append([_record(key, tokens) for key, tokens in zip(keys, draws, strict=True)])
                version = store.commit()
        return Snapshot.open(path, version)


def _record(key: int, tokens: np.ndarray) -> Record:
    return Record(
        key=key,
        source="random",
        document=0,
        offset=0,
        subject=None,
        kind="real",
        surprise=1.0,
        fast_step=0,
        release=0,
        tokens=tokens,
    )


# -- the page ----------------------------------------------------------------------------------------------------------


def render(figures: Figures) -> str:
    """Markdown: speed, guides, bytes, scaling."""
    parts = [_speed(figures), _guides(figures), _bytes(figures), _scaling(figures)]
    return "\n\n".join(parts)


def _speed(figures: Figures) -> str:
    task, gpu = figures.task, figures.cfg.compute.device == "cuda"
    header = ["ranks", "way", "tokens/s" if gpu else "tokens/CPU-s", "by one process's", "tokens/s by the clock"]
    header += ["MiB per step and rank"]
    rows = []
    for world, ranks in figures.ranks.items():
        for name, rate in ranks.rates.items():
            tokens = task.share * figures.cfg.model.context * (1 if name == PLAIN else world)
            wall = ranks.seconds[name]
            speed = Spread(tokens / wall.median, tokens / wall.high, tokens / wall.low)
            moved = f"{ranks.moved[name] / task.round_steps / 2**20:.2f}" if name in ranks.moved else ""
            cells = [rate.tokens_per_s.show(",.0f"), rate.ratio.show(".2f"), speed.show(",.0f"), moved]
            rows.append([str(world), name, *cells])
    about = (
        f"Sleep steps (student, teacher and anchor; {task.share} sequences of {figures.cfg.model.context} tokens per "
        f"rank and step, {figures.costs.weights / 4e6:.1f}M parameters, {figures.cfg.compute.precision}), "
        f"{task.repeats} repeats in turns; every way is held against *{PLAIN}*, the same step without DeepSpeed, just "
        f"before and after. *{PARALLEL}* is that one under torch's DistributedDataParallel, *{BESIDE}* one on every "
        f"rank, *{AWAKE}* what the learner does. With *{UNGUIDED.strip(', ')}* it is a plain "
        "training step through the very same engine: the distance to it is what guides cost."
    )
    return f"**Speed.** {about}\n\n{markdown_table(header, rows)}"


def _guides(figures: Figures) -> str:
    guides = figures.guides
    names = ["computed at every visit", "stored: once", "stored: every visit"]
    seconds = [guides.recompute, guides.write, guides.read]
    rows = [[name, f"{1e6 * each:.2f}"] for name, each in zip(names, seconds, strict=True)]
    pays = "never" if guides.visits_to_pay == float("inf") else f"from visit {guides.visits_to_pay:.1f} on"
    about = (
        f"A guide as {figures.cfg.sleep.top_k} log-probabilities and a tail takes {guides.stored_bytes:.0f} bytes per "
        f"token ({guides.logits_bytes:.0f} as logits); storing pays {pays}."
    )
    return f"**Guides.** {about}\n\n{markdown_table(['guide', 'CPU us per token'], rows)}"


def _bytes(figures: Figures) -> str:
    traffic = figures.traffic
    pool = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in traffic.pool.items())
    return (
        f"**Bytes moved in a round** of {traffic.steps} sleep steps, by the kernel's counters: learner to pool "
        f"{traffic.to_pool / 2**20:.1f} MiB (experience and fast snapshot), pool to learner "
        f"{traffic.to_learner / 2**20:.1f} MiB (a release). Two data-parallel ranks on the tokens slept on: "
        f"{traffic.data_parallel / 2**20:,.0f} MiB each, **{traffic.saving:.1f} times as much** (at least "
        f"{LEAST_SAVING:.0f} required). The pool's ranks among themselves move no less than that (MiB each: "
        f"{pool})."
    )


def _scaling(figures: Figures) -> str:
    most = max(figures.ranks)
    checks = []
    for name, seconds in figures.predicted.items():
        measured = figures.ranks[most].seconds[name]
        error = seconds / measured.median - 1
        checks.append([name, f"{1000 * seconds:.0f}", measured_ms(measured), f"{error:+.0%}"])
    header = ["nodes", "of these asleep", "tokens/s", "per node, by 2 nodes'", "round s", "period s"]
    header += ["data-parallel tokens/s"]
    rows, first = [], figures.scaling[0]
    for point in figures.scaling:
        share = point.sustained / point.nodes / (first.sustained / first.nodes)
        cells = [f"{point.sustained:,.0f}", f"{share:.2f}", f"{point.round_seconds:.0f}", f"{point.period_seconds:.0f}"]
        rows.append([f"{point.nodes:,}", f"{point.pool:,}", *cells, f"{point.data_parallel:,.0f}"])
    link = figures.costs.link
    about = (
        "A step on n ranks is that of one rank and its collectives, as many as torch's profiler counts and with the "
        f"bytes that the kernel does: rings of messages of {1e6 * link.alpha:.0f} us and {link.beta * 2**30:.2f} s/GiB "
        f"each, as all-reduces over {most} ranks took. On this one machine {most} ranks take "
        f"{figures.ranks[most].crowding:.2f} times as long as one even where neither waits for the other, which is "
        f"part of the prediction. For a step on {most} ranks it says:"
    )
    then = (
        "And for more nodes of this kind, which do not share a machine, periods growing with them: tokens of the "
        "stream per second that are slept on too, at the best split between learner and pool (simulated). Beside it "
        "all nodes as one data-parallel training of the same tokens:"
    )
    table = markdown_table(["way", "predicted ms", "measured ms", "error"], checks)
    return f"**Scaling.** {about}\n\n{table}\n\n{then}\n\n{markdown_table(header, rows)}"


def measured_ms(seconds: Spread) -> str:
    """A spread of seconds in milliseconds."""
    return Spread(1000 * seconds.median, 1000 * seconds.low, 1000 * seconds.high).show(".0f")


def main() -> None:
    """Measure, print the page, and write it beside the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sleep", description=__doc__)
    parser.add_argument("--config", default="default", help="name of a configuration, or a YAML file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps per visit")
    parser.add_argument("--ranks", type=int, default=2, help="the larger number of ranks")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/sleep.json"), metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    cfg = load_config(options.config, options.overrides)
    figures = measure(cfg, options.repeats, options.steps, (1, options.ranks))
    page = render(figures)
    print(page)
    options.json.write_text(json.dumps(figures.as_json(), indent=2) + "\n")
    keep_page(options.json, page)


if __name__ == "__main__":
    main()
