"""Training state of the pool on disk: whole tensors by parameter name, whatever the number of ranks and the ZeRO stage.

DeepSpeed's universal checkpoint (0.19.8) serves another number of ranks with Adam, but not another kind of stage: what
stage 1 or 2 saved does not load into stage 3, nor the other way round (`assert len(self.ckpt_list) > 0` fails); stage 0
does not convert (`FileNotFoundError: can't find *_optim_states.pt files`), SGD neither (`KeyError: 'exp_avg'`). It
converts for seconds in a process of its own, needs the space twice, and is pickle. So each rank writes the full fp32
tensors of every N-th parameter as safetensors: gathered one at a time, as a candidate's weights are, read by name,
nothing to convert.

A state is a directory: `state-R-of-N.safetensors` per rank, and `STABLE` (JSON), written last, without which it does
not exist. Tensors are called `weight/PARAMETER`, `average/PARAMETER` and
`MOMENT/PARAMETER`, all fp32.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import torch
from safetensors import safe_open
from torch import Tensor

from nl_model.weights import save_tensors, write_durably
from pipelines.sleep.engine import Engine

MARKER = "STABLE"
NO_MOMENTS = ("weight", "average")
"""Prefixes of tensors that are no optimizer's."""


@dataclass(frozen=True)
class TrainingState:
    """A state that is whole on disk. Tensors are read when they are asked for."""

    directory: Path
    key: Dict[str, Any]
    """What training it is a state of: the round's plan."""
    step: int
    """Steps of that training that are done."""
    counters: Dict[str, float]
    """The optimizer's own counters (Adam's `step`)."""
    progress: List[Dict[str, Any]]
    """What each rank had gathered about its training so far."""
    files: Dict[str, str]
    """sha256 by file."""
    places: Dict[str, str] = field(repr=False)
    """File by tensor."""

    def get(self, name: str) -> Optional[Tensor]:
        """One tensor, on the CPU; None where the state has none of that name."""
        if name not in self.places:
            return None
        with safe_open(self.directory / self.places[name], framework="pt") as file:
            found: Tensor = file.get_tensor(name)
        return found

    def moments(self) -> List[str]:
        """Names of the moments (Adam: exp_avg and exp_avg_sq)."""
        return sorted({name.partition("/")[0] for name in self.places} - set(NO_MOMENTS))

    def weights(self) -> Dict[str, Tensor]:
        """All weights by parameter name; empty where only moments were kept."""
        return self._below("weight")

    def average(self) -> Dict[str, Tensor]:
        """The average of the weights so far, by parameter name; empty where none is kept."""
        return self._below("average")

    def _below(self, prefix: str) -> Dict[str, Tensor]:
        found = {
            name.removeprefix(f"{prefix}/"): self.get(name) for name in self.places if name.startswith(f"{prefix}/")
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def progress_of(self, rank: int, world: int) -> Dict[str, Any]:
        """A rank's own progress; in a pool of another size counts are shared out anew, the rest is some rank's."""
        if world == len(self.progress):
            return self.progress[rank]
        found = dict(self.progress[rank % len(self.progress)])
        for name, value in found.items():
            if isinstance(value, int):
                total = sum(part[name] for part in self.progress)
                found[name] = total // world + (rank < total % world)
        return found

    def intact(self, rank: int, world: int) -> bool:
        """Whether this rank's share of the files has the checksums it should have."""
        return all(
            (self.directory / file).is_file()
            and hashlib.sha256((self.directory / file).read_bytes()).hexdigest() == self.files[file]
            for file in sorted(self.files)[rank::world]
        )


def write_state(
    directory: Path,
    engine: Engine,
    key: Mapping[str, Any],
    step: int = 0,
    progress: Optional[Mapping[str, Any]] = None,
    weights: bool = True,
    average: Optional[Mapping[str, Tensor]] = None,
) -> None:
    """Write a state. A collective; when rank 0 comes back, the state is whole.

    Args:
        engine: between two steps.
        key: a JSON-able mapping that names the training.
        step: steps done.
        progress: what this rank wants to have again.
        weights: write them too, and not only the moments.
        average: of the weights, the same on every rank; written too where there is one.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if not rank:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    torch.distributed.barrier()
    averages = ((f"average/{name}", tensor) for name, tensor in (average or {}).items())
    kept = {
        name: tensor for i, (name, tensor) in enumerate(chain(engine.state(weights), averages)) if i % world == rank
    }
    file = f"state-{rank:05d}-of-{world:05d}.safetensors"
    mine = (file, save_tensors(directory / file, kept), sorted(kept), dict(progress or {}))
    found = _gathered(mine)
    if not rank:
        marker = {
            "key": dict(key),
            "step": step,
            "counters": engine.counters(),
            "progress": [part[3] for part in found],
            "files": {part[0]: part[1] for part in found},
            "places": {name: part[0] for part in found for name in part[2]},
        }
        write_durably(directory / MARKER, json.dumps(marker).encode())


def read_state(directory: Path) -> Optional[TrainingState]:
    """The state in a directory, None where there is none or a file of it is damaged. A collective."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    state = None
    if (directory / MARKER).is_file():
        state = TrainingState(directory, **json.loads((directory / MARKER).read_text()))
    whole = state is not None and state.intact(rank, world)
    return state if all(_gathered(whole)) else None


class RoundStates:
    """The states that a training leaves on its way; the newest is where a repeated attempt goes on.

    Args:
        directory: of this training alone, shared by all ranks.
        key: names the training; what another one left in the directory is removed.
        every: steps between states; 0: none are written, none are read.
    """

    def __init__(self, directory: Path, key: Mapping[str, Any], every: int) -> None:
        self.directory, self.every = directory, every
        self.key: Dict[str, Any] = json.loads(json.dumps(dict(key)))

    def newest(self) -> Optional[TrainingState]:
        """The newest whole state of this training. A collective."""
        if not self.every:
            return None
        # What rank 0 sees counts: ranks on other nodes may see a shared folder a little later.
        names = _gathered(sorted((path.name for path in self.directory.glob("step-*")), reverse=True))[0]
        for name in names:
            state = read_state(self.directory / name)
            if state is not None and state.key == self.key:
                return state
        torch.distributed.barrier()
        if not torch.distributed.get_rank():
            self.clear()
        return None

    def after(
        self,
        engine: Engine,
        step: int,
        steps: int,
        progress: Mapping[str, Any],
        average: Optional[Mapping[str, Tensor]] = None,
    ) -> None:
        """To be called by every rank after a step: writes a state where one is due, and removes older ones."""
        if not self.every or step % self.every or step == steps:
            return
        directory = self.directory / f"step-{step:08d}"
        write_state(directory, engine, self.key, step, progress, average=average)
        if not torch.distributed.get_rank():
            for older in self.directory.glob("step-*"):
                if older != directory:
                    shutil.rmtree(older, ignore_errors=True)

    def clear(self) -> None:
        """Remove all states; for one rank, when the training's result is safe."""
        shutil.rmtree(self.directory, ignore_errors=True)


def _gathered(mine: Any) -> List[Any]:
    """One JSON-able thing of every rank, in order of ranks."""
    found: List[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return found
