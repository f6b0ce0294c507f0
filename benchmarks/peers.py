"""Other implementations beside ours: installed from the package index, each in an environment of its own, and run.

They take turns with the reference in the same run: a driver waits in a process of its own until it is asked for steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import venv
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List

from benchmarks.drivers.serve import ANSWER
from benchmarks.interleave import Visit
from benchmarks.variants import Shape

TORCH = "torch==2.13.0"
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Peer:
    """One implementation and how it is run."""

    requirement: str
    """What pip installs."""
    driver: str
    """Module of benchmarks.drivers."""
    about: str
    variant: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the shape that differ."""
    steps: int = 1
    """Steps per visit."""


PEERS = {
    "nested-learning hope_attention": Peer(
        "nested-learning==0.2.0",
        "nested_learning_step",
        "nested-learning 0.2.0, attention and levels of 16, 64 and 256 steps; every parameter trained, one write pass",
        "hope_attention",
    ),
    "nested-learning hope_selfmod": Peer(
        "nested-learning==0.2.0",
        "nested_learning_step",
        "the same with self-modifying memories and a fast state, which allows one sequence at a time",
        "hope_selfmod",
        {"batch": 1},
    ),
    "titans-pytorch MAC": Peer(
        "titans-pytorch==0.5.5",
        "titans_pytorch_step",
        "titans-pytorch 0.5.5, memory as context, neural memories in two of the layers, every parameter trained",
    ),
}


@dataclass(frozen=True)
class Running:
    """Peers that wait for their turn."""

    visits: Dict[str, Visit]
    parameters: Dict[str, int]
    missing: Dict[str, str]
    """Why the others do not run."""


def default_folder() -> Path:
    """Where environments are kept, so that a second run finds them."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "circadian" / "peers"


def install(requirement: str, folder: Path) -> Path:
    """An environment with a package in it; returns its interpreter. RuntimeError where pip fails."""
    home = folder / requirement.replace("==", "-")
    python = home / "bin" / "python"
    if (home / "installed").exists():
        return python
    venv.create(home, with_pip=True, clear=True)
    command = [str(python), "-m", "pip", "install", "--quiet", TORCH, "numpy", requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pip install {TORCH} {requirement}: {last_line(done.stderr)}")
    (home / "installed").touch()
    return python


def last_line(text: str) -> str:
    """The last line that says something."""
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["no message"])[-1]


@contextmanager
def running_peers(shape: Shape, folder: Path | None = None, peers: Mapping[str, Peer] = PEERS) -> Iterator[Running]:
    """Install and start peers; they end with the context."""
    folder = folder or default_folder()
    running = Running({}, {}, {})
    with ExitStack() as stack:
        for name, peer in peers.items():
            asked = replace(shape, **peer.changes)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                python = install(peer.requirement, folder)
                driver = stack.enter_context(Driver(name, python, peer, asked, folder))
            except RuntimeError as error:
                running.missing[name] = str(error)
                continue
            running.visits[name], running.parameters[name] = driver.visit, driver.parameters
        yield running


class Driver:
    """A peer in a process of its own. RuntimeError where it ends by itself."""

    def __init__(self, name: str, python: Path, peer: Peer, shape: Shape, folder: Path) -> None:
        self.name, self.peer, self.shape = name, peer, shape
        self.log = folder / f"{name.replace(' ', '_')}.log"
        asked = json.dumps({**asdict(shape), "variant": peer.variant})
        command: List[str] = [str(python), "-m", f"benchmarks.drivers.{peer.driver}", asked]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        pipe = subprocess.PIPE
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment, cwd=ROOT
            )
        self.parameters = int(self._answer()["parameters"])

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # the end of its stdin is the end of it

    def visit(self) -> float:
        """Take some steps; returns seconds per token."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{self.peer.steps}\n")
        self.process.stdin.flush()
        return self._answer()["seconds"] / (self.peer.steps * self.shape.step_tokens)

    def _answer(self) -> Dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):  # libraries print too
                return json.loads(line.removeprefix(ANSWER))
        self.process.communicate()
        raise RuntimeError(f"{self.name} ended: {last_line(self.log.read_text())}")
