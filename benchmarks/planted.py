"""Bad candidates for the gate: honest ones that something happened to, in memory or on disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Dict, List, Optional

import torch

from benchmarks.honest import Found, HonestRun
from cluster.storage.releases import Shard, load_release, write_shard
from nl_model.weights import join, load_into
from pipelines.gate.decision import Decision
from pipelines.sleep.base import TrueTokens
from pipelines.sleep.batches import RoundBatches
from pipelines.sleep.round import Weights, mean_loss
from pipelines.sleep.schedule import Schedule
from pipelines.sleep.training import train

OVERTRAINED = Schedule("constant", 6e-3, 60, warmup=1)
"""How to ruin a model with recent experience."""


@dataclass(frozen=True)
class Bad:
    """A planted candidate: its tensors, and what happens to its files."""

    tensors: Weights
    spoil: Callable[[Path, List[Shard]], List[Shard]] = lambda _, shards: shards
    """Changes the files in a directory; returns what the writers claim."""
    ending: Optional[float] = None
    """Where training itself went wrong: the loss that it ended with."""


Plant = Callable[[HonestRun, Found, torch.Generator], Bad]


def _changed(found: Found, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Bad:
    return Bad({**found.tensors, name: change(found.tensors[name].clone())})


def _pick(found: Found, generator: torch.Generator, part: str = "") -> str:
    """A random matrix of the candidate's slow levels whose name holds `part`."""
    names = [n for n, t in sorted(found.tensors.items()) if n.startswith("weight/") and t.ndim == 2 and part in n]
    return names[int(torch.randint(len(names), (1,), generator=generator))]


def _one_entry(value: float) -> Plant:
    def plant(run: HonestRun, found: Found, generator: torch.Generator) -> Bad:
        def change(tensor: torch.Tensor) -> torch.Tensor:
            tensor.view(-1)[int(torch.randint(tensor.numel(), (1,), generator=generator))] = value
            return tensor

        return _changed(found, _pick(found, generator), change)

    return plant


def shuffled_layer(run: HonestRun, found: Found, generator: torch.Generator) -> Bad:
    """Every matrix of one block with its entries in a random order."""
    block = int(torch.randint(run.cfg.model.blocks, (1,), generator=generator))
    tensors = dict(found.tensors)
    for name, tensor in found.tensors.items():
        if f"blocks.{block}." in name and name.startswith("weight/") and tensor.ndim == 2:
            order = torch.randperm(tensor.numel(), generator=generator)
            tensors[name] = tensor.view(-1)[order].view_as(tensor).clone()
    return Bad(tensors)


def noise(run: HonestRun, found: Found, generator: torch.Generator) -> Bad:
    """Every weight with noise as large as itself."""
    tensors = {
        name: t + t.std() * torch.randn(t.shape, generator=generator)
        if name.startswith("weight/") and t.ndim == 2
        else t
        for name, t in found.tensors.items()
    }
    return Bad(tensors)


def overtrained(run: HonestRun, found: Found, generator: torch.Generator) -> Bad:
    """Trained on the recent experience alone, for long, with a large step size."""
    sleep, precision = run.cfg.sleep, run.cfg.compute.precision
    model = run.host.build_model()
    load_into(model, found.made.weights)
    batches = RoundBatches(run.store.at(found.plan.snapshot), found.plan, replace(sleep, recent=1.0))
    engine = run.host.build_engine(model, sleep.optimizer, sleep.batch, (), None)
    train(engine, TrueTokens(), batches, OVERTRAINED, run.host.device, precision=precision)
    weights = join(weight=dict(engine.weights()))
    return Bad({**found.tensors, **weights}, ending=mean_loss(engine, found.made.last.tokens_BS, precision))


def _old(back: int, disturbed: float) -> Plant:
    """Weights of an earlier release (0: the anchor), with a relative disturbance."""

    def plant(run: HonestRun, found: Found, generator: torch.Generator) -> Bad:
        tensors = dict(load_release(run.releases.directory(max(0, found.plan.anchor - back))))
        if disturbed:
            tensors = {n: t * (1 + disturbed * torch.randn(t.shape, generator=generator)) for n, t in tensors.items()}
        return Bad(tensors)

    return plant


def base_again(run: HonestRun, found: Found, generator: torch.Generator) -> Bad:
    """The base, with the offsets of the found."""
    base = load_release(run.releases.directory(0))
    return Bad({**found.tensors, **{n: t for n, t in base.items() if n.startswith("weight/")}})


def _spoiled(spoil: Callable[[Path, List[Shard], torch.Generator], List[Shard]]) -> Plant:
    def plant(run: HonestRun, found: Found, generator: torch.Generator) -> Bad:
        return Bad(found.tensors, lambda directory, shards: spoil(directory, shards, generator))

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


def foreign_shard(run: HonestRun, found: Found, generator: torch.Generator) -> Bad:
    """One shard is the anchor's, and the index says so: every checksum is right."""

    def spoil(directory: Path, shards: List[Shard]) -> List[Shard]:
        old = run.releases.read(found.plan.anchor).shards[0]
        shutil.copyfile(run.releases.directory(found.plan.anchor) / old.file, directory / shards[0].file)
        return [old, *shards[1:]]

    return Bad(found.tensors, spoil)


def _without(part: str) -> Plant:
    def plant(run: HonestRun, found: Found, generator: torch.Generator) -> Bad:
        gone = _pick(found, generator, part)
        return Bad({name: t for name, t in found.tensors.items() if name != gone})

    return plant


def _reshaped(change: Callable[[torch.Tensor], torch.Tensor]) -> Plant:
    def plant(run: HonestRun, found: Found, generator: torch.Generator) -> Bad:
        return _changed(found, _pick(found, generator, "blocks"), change)

    return plant


def twice(run: HonestRun, found: Found, generator: torch.Generator) -> Bad:
    """A tensor lies in both shards."""

    def spoil(directory: Path, shards: List[Shard]) -> List[Shard]:
        name, tensors = sorted(found.tensors)[0], found.tensors
        held = {n: tensors[n] for n in shards[1].tensors} | {name: tensors[name] + 1.0}
        return [shards[0], write_shard(directory, 1, len(shards), held, run.identity(found))]

    return Bad(found.tensors, spoil)


def scaled(run: HonestRun, found: Found, generator: torch.Generator) -> Bad:
    """One block's matrices ten times as large."""
    block = int(torch.randint(run.cfg.model.blocks, (1,), generator=generator))
    tensors = {name: t * 10 if f"blocks.{block}." in name and t.ndim == 2 else t for name, t in found.tensors.items()}
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


def judge_planted(run: HonestRun, found: Found, plant: Plant, seed: int) -> Decision:
    """Write a bad candidate and judge it."""
    bad = plant(run, found, torch.Generator().manual_seed(seed))
    number = found.plan.anchor + 1
    directory = run.releases.prepare(number)
    shards = bad.spoil(directory, run.write(directory, bad.tensors, run.identity(found)))
    ending = found.made.ending if bad.ending is None else bad.ending
    decision, _ = run.judge(found, bad.tensors, ending, directory, shards)
    run.releases.discard(number)
    return decision
