"""The gate against planted bad candidates and against honest ones. `python -m benchmarks.gate [--json FILE]`.

Honest candidates come from real rounds of small runs with different seeds and sources; bad ones are honest ones that
something happened to, in memory or on disk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch

from benchmarks.results import keep_page
from benchmarks.small_run import Candidate, SmallRun, Tensors, plain_step
from benchmarks.tables import Machine, markdown_table
from cluster.pool.judge import ending_loss
from cluster.storage.releases import Shard, load_release, split, write_shard
from nl_model.model import NestedLM
from nl_model.optim.levelwise import build_optimizer
from nl_model.weights import load_into
from pipelines.config.load import load_config
from pipelines.config.schema import Config
from pipelines.experience import Snapshot
from pipelines.gate.decision import Decision, decide
from pipelines.sleep.batches import RoundBatches

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
)
"""The smoke configuration's model with a base long enough (800 steps) for every layer to matter, and rounds of 64 steps
and more."""


@dataclass(frozen=True)
class Bad:
    """A planted candidate: its tensors, and what happens to its files."""

    tensors: Tensors
    spoil: Callable[[Path, List[Shard]], List[Shard]] = lambda _, shards: shards
    """Changes the files in a directory; returns what the writers claim."""
    ending: Optional[float] = None
    """Where training itself went wrong: the loss that it ended with."""


Plant = Callable[[SmallRun, Candidate, torch.Generator], Bad]


def _changed(candidate: Candidate, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Bad:
    return Bad({**candidate.tensors, name: change(candidate.tensors[name].clone())})


def _pick(candidate: Candidate, generator: torch.Generator, part: str = "") -> str:
    """A random matrix of the candidate's slow levels whose name holds `part`."""
    names = [n for n, t in sorted(candidate.tensors.items()) if n.startswith("weight/") and t.ndim == 2 and part in n]
    return names[int(torch.randint(len(names), (1,), generator=generator))]


def _one_entry(value: float) -> Plant:
    def plant(run: SmallRun, candidate: Candidate, generator: torch.Generator) -> Bad:
        def change(tensor: torch.Tensor) -> torch.Tensor:
            tensor.view(-1)[int(torch.randint(tensor.numel(), (1,), generator=generator))] = value
            return tensor

        return _changed(candidate, _pick(candidate, generator), change)

    return plant


def shuffled_layer(run: SmallRun, candidate: Candidate, generator: torch.Generator) -> Bad:
    """Every matrix of one block with its entries in a random order."""
    block = int(torch.randint(run.cfg.model.blocks, (1,), generator=generator))
    tensors = dict(candidate.tensors)
    for name, tensor in candidate.tensors.items():
        if f"blocks.{block}." in name and name.startswith("weight/") and tensor.ndim == 2:
            order = torch.randperm(tensor.numel(), generator=generator)
            tensors[name] = tensor.view(-1)[order].view_as(tensor).clone()
    return Bad(tensors)


def noise(run: SmallRun, candidate: Candidate, generator: torch.Generator) -> Bad:
    """Every weight with noise as large as itself."""
    tensors = {
        name: t + t.std() * torch.randn(t.shape, generator=generator)
        if name.startswith("weight/") and t.ndim == 2
        else t
        for name, t in candidate.tensors.items()
    }
    return Bad(tensors)


def overtrained(run: SmallRun, candidate: Candidate, generator: torch.Generator) -> Bad:
    """Trained on the recent experience alone, for long, with a large step size."""
    model = NestedLM(run.cfg.model, run.cfg.levels, run.setting.tokenizer.vocab_size)
    load_into(model, split(candidate.tensors, "weight"))
    snapshot = Snapshot.open(run.path / "store", candidate.plan.snapshot)
    batches = RoundBatches(snapshot, candidate.plan, replace(run.cfg.sleep, recent=1.0))
    optimizer = build_optimizer(model.parameters(), run.cfg.sleep.optimizer)
    for step in range(60):
        plain_step(optimizer, model.nll(batches.batch(step)[0]).mean(), 6e-3)
    weights = {f"weight/{name}": p.detach().clone() for name, p in model.named_parameters()}
    return Bad({**candidate.tensors, **weights}, ending=ending_loss(model, candidate.last, run.cfg.compute.precision))


def _old(back: int, disturbed: float) -> Plant:
    """Weights of an earlier release (0: the anchor), with a relative disturbance."""

    def plant(run: SmallRun, candidate: Candidate, generator: torch.Generator) -> Bad:
        tensors = dict(load_release(run.releases.directory(max(0, candidate.plan.anchor - back))))
        if disturbed:
            tensors = {n: t * (1 + disturbed * torch.randn(t.shape, generator=generator)) for n, t in tensors.items()}
        return Bad(tensors)

    return plant


def base_again(run: SmallRun, candidate: Candidate, generator: torch.Generator) -> Bad:
    """The base, with the offsets of the candidate."""
    base = load_release(run.releases.directory(0))
    return Bad({**candidate.tensors, **{n: t for n, t in base.items() if n.startswith("weight/")}})


def _spoiled(spoil: Callable[[Path, List[Shard], torch.Generator], List[Shard]]) -> Plant:
    def plant(run: SmallRun, candidate: Candidate, generator: torch.Generator) -> Bad:
        return Bad(candidate.tensors, lambda directory, shards: spoil(directory, shards, generator))

    return plant


def _flip_byte(directory: Path, shards: List[Shard], generator: torch.Generator) -> List[Shard]:
    path = directory / shards[int(torch.randint(len(shards), (1,), generator=generator))].file
    content = bytearray(path.read_bytes())
    content[int(torch.randint(len(content), (1,), generator=generator))] ^= 4
    path.write_bytes(bytes(content))
    return shards


def _cut_short(directory: Path, shards: List[Shard], _: torch.Generator) -> List[Shard]:
    path = directory / shards[1].file
    path.write_bytes(path.read_bytes()[:-64])
    return shards


def _swap_files(directory: Path, shards: List[Shard], _: torch.Generator) -> List[Shard]:
    one, other = (directory / shard.file for shard in shards[:2])
    other.rename(directory / "aside")
    one.rename(other)
    (directory / "aside").rename(one)
    return shards


def _swap_with_claims(directory: Path, shards: List[Shard], generator: torch.Generator) -> List[Shard]:
    """Files and index changed alike, so that every checksum is right."""
    _swap_files(directory, shards, generator)
    one, other = shards[:2]
    return [replace(other, file=one.file), replace(one, file=other.file), *shards[2:]]


def _lose_file(directory: Path, shards: List[Shard], _: torch.Generator) -> List[Shard]:
    (directory / shards[0].file).unlink()
    return shards


def _lose_claim(_: Path, shards: List[Shard], __: torch.Generator) -> List[Shard]:
    return shards[:1]


def foreign_shard(run: SmallRun, candidate: Candidate, generator: torch.Generator) -> Bad:
    """One shard is the anchor's, and the index says so: every checksum is right."""

    def spoil(directory: Path, shards: List[Shard]) -> List[Shard]:
        old = run.releases.read(candidate.plan.anchor).shards[0]
        shutil.copyfile(run.releases.directory(candidate.plan.anchor) / old.file, directory / shards[0].file)
        return [old, *shards[1:]]

    return Bad(candidate.tensors, spoil)


def _without(part: str) -> Plant:
    def plant(run: SmallRun, candidate: Candidate, generator: torch.Generator) -> Bad:
        gone = _pick(candidate, generator, part)
        return Bad({name: t for name, t in candidate.tensors.items() if name != gone})

    return plant


def _reshaped(change: Callable[[torch.Tensor], torch.Tensor]) -> Plant:
    def plant(run: SmallRun, candidate: Candidate, generator: torch.Generator) -> Bad:
        return _changed(candidate, _pick(candidate, generator, "blocks"), change)

    return plant


def twice(run: SmallRun, candidate: Candidate, generator: torch.Generator) -> Bad:
    """A tensor lies in both shards."""

    def spoil(directory: Path, shards: List[Shard]) -> List[Shard]:
        name, tensors = sorted(candidate.tensors)[0], candidate.tensors
        held = {n: tensors[n] for n in shards[1].tensors} | {name: tensors[name] + 1.0}
        return [shards[0], write_shard(directory, 1, len(shards), held, run.identity(candidate))]

    return Bad(candidate.tensors, spoil)


def scaled(run: SmallRun, candidate: Candidate, generator: torch.Generator) -> Bad:
    """One block's matrices ten times as large."""
    block = int(torch.randint(run.cfg.model.blocks, (1,), generator=generator))
    tensors = {
        name: t * 10 if f"blocks.{block}." in name and t.ndim == 2 else t for name, t in candidate.tensors.items()
    }
    return Bad(tensors)


PLANTS: Dict[str, Plant] = {
    "NaN": _one_entry(float("nan")),
    "infinity": _one_entry(float("inf")),
    "shuffled layer": shuffled_layer,
    "over-trained on the recent source": overtrained,
    "anchor again": _old(0, 0.0),
    "earlier release": _old(1, 0.0),
    "earlier release disturbed": _old(1, 1e-4),
    "base again": base_again,
    "noise": noise,
    "one block scaled": scaled,
    "tampered shard": _spoiled(_flip_byte),
    "shard cut short": _spoiled(_cut_short),
    "swapped shards": _spoiled(_swap_files),
    "swapped shards and index": _spoiled(_swap_with_claims),
    "shard of another candidate": foreign_shard,
    "missing shard": _spoiled(_lose_file),
    "missing shard and index": _spoiled(_lose_claim),
    "missing tensor": _without(""),
    "tensor in two shards": twice,
    "wrong shape": _reshaped(lambda t: t[:-1].clone()),
    "transposed": _reshaped(lambda t: t.T.reshape(1, *t.T.shape).clone()),
    "wrong dtype": _reshaped(lambda t: t.double()),
    "embedding of zeros": lambda run, c, g: _changed(c, _pick(c, g, "embed"), torch.zeros_like),
}
"""Kinds of bad candidates by name."""


def judge_planted(run: SmallRun, candidate: Candidate, plant: Plant, seed: int) -> Decision:
    """Write a bad candidate and judge it."""
    bad = plant(run, candidate, torch.Generator().manual_seed(seed))
    directory = run.releases.prepare(candidate.plan.anchor + 1)
    shards = bad.spoil(directory, run.write(directory, bad.tensors, run.identity(candidate)))
    ending = candidate.ending if bad.ending is None else bad.ending
    changed = replace(candidate, tensors=bad.tensors, ending=ending)
    decision = decide(run.evidence(changed, directory, shards), run.cfg.gate)
    run.releases.discard(candidate.plan.anchor + 1)
    return decision


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


def case(kind: str, run: SmallRun, number: int, decision: Decision) -> Case:
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
            run = SmallRun(next(configs), Path(folder))
            while run.wake() and min(honest, planted) < candidates:
                candidate = run.sleep()
                for _ in range(2 if run.live else 0):
                    if planted < candidates:
                        kind, planted = kinds[planted % len(kinds)], planted + 1
                        yield case(kind, run, run.round, judge_planted(run, candidate, PLANTS[kind], planted))
                decision = run.night(candidate)
                if honest < candidates:
                    honest += 1
                    yield case("honest", run, run.round, decision)
            run.close()


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
        command = f"python -m benchmarks.gate --candidates {arguments.candidates}"
        command += f" --kinds '{arguments.kinds}'" if arguments.kinds else ""
        keys = ("planted_blocked", "planted", "honest_blocked", "honest")
        figures = dict(zip(keys, blocked(cases), strict=True))
        payload = {**figures, "command": command, "overrides": OVERRIDES, "cases": [asdict(c) for c in cases]}
        arguments.json.write_text(json.dumps(payload, indent=1) + "\n")
        keep_page(arguments.json, command, render(cases))


if __name__ == "__main__":
    main()
