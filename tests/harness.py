"""Real runs as subprocesses: start them, watch their journal, find their processes, kill them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import psutil

from pipelines.report.events import read_events

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 240.0
"""Seconds that any one command may take; more means that it hangs."""
POLL = 0.02


def environment() -> Dict[str, str]:
    """Ours, without what would lead to another Ray cluster; the code is importable from any folder. Runs are traced."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env["PYTHONPATH"] = str(ROOT)
    return {**env, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "COLUMNS": "200", "CIRCADIAN_TRACE": "1"}


def circadian(*arguments: str, cwd: Path, timeout: float = TIMEOUT) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    return subprocess.run(
        command, env=environment(), cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )


def same_process(process: psutil.Process) -> bool:
    """Whether a process is there still (not a zombie, not another one of that number)."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True)
class Run:
    """A run directory and the command that makes it.

    Every process of the run inherits a working folder of its own, by which it is found when its parents are gone.
    """

    root: Path
    name: str
    overrides: Tuple[str, ...] = ()
    config: str = "smoke"

    @property
    def directory(self) -> Path:
        return self.root / self.name

    @property
    def cwd(self) -> Path:
        folder = self.root / f"{self.name}.cwd"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def log(self) -> Path:
        """Output of all attempts."""
        return self.root / f"{self.name}.log"

    def arguments(self) -> List[str]:
        return ["run", self.config, f"run.root={self.root}", f"run.name={self.name}", *self.overrides]

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", *self.arguments()],
                env=environment(),
                cwd=self.cwd,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self, timeout: float = TIMEOUT) -> int:
        """Run to the end; returns the exit status."""
        with self.attempt() as process:
            return process.wait(timeout)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[subprocess.Popen[bytes]]:
        """A started driver. Whatever is left of it in the end is killed: a test that fails leaves nothing behind."""
        process = self.start()
        try:
            yield process
        finally:
            if process.poll() is None:
                for left in [psutil.Process(process.pid), *self.processes()]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        left.kill()
                process.wait(30)

    def events(self, kind: str = "") -> List[Dict[str, Any]]:
        """The journal so far, or its events of one kind."""
        path = self.directory / "events.jsonl"
        if not path.exists():
            return []
        return [event for event in read_events(path) if kind in ("", event["event"])]

    def reached(self, tokens: int = 1) -> bool:
        """Whether the journal tells of a stream position that far."""
        return any(event["tokens"] >= tokens for event in self.events("wake"))

    def wrote(self, number: int) -> bool:
        """Whether the journal has that many events."""
        return len(self.events()) >= number

    def summary(self) -> Dict[str, Any]:
        found: Dict[str, Any] = json.loads((self.directory / "summary.json").read_text())
        return found

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def wait_until(self, process: subprocess.Popen[bytes], reached: Callable[[], Any], timeout: float = TIMEOUT) -> Any:
        """Poll until something holds, and return it; None where the driver ended first."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if found := reached():
                return found
            if process.poll() is not None:
                return reached() or None
            time.sleep(POLL)
        raise AssertionError(f"not reached within {timeout:.0f} s:\n{self.tail()}")

    def processes(self, title: str = "") -> List[psutil.Process]:
        """Living processes of the run whose title begins so; found by their working folder."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
                if process.cwd() == str(self.cwd) and same_process(process):
                    line = process.cmdline()
                    if line and line[0].startswith(title):
                        found.append(process)
        return found

    def wait_until_gone(self, timeout: float = 15.0) -> List[str]:
        """Titles of processes that outlive the driver by `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [" ".join(process.cmdline()[:3]) for process in left]


def kill(processes: Sequence[psutil.Process], number: int = signal.SIGKILL) -> List[int]:
    """Send a signal; returns the ids of those that were there to get it."""
    hit = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
            hit.append(process.pid)
    return hit
