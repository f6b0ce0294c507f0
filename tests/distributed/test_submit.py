"""Runs as Ray jobs on a real cluster of one node, with token authentication, over real sockets."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List

import pytest

from cluster.submit import job_config, submission_id
from pipelines.config.load import load_config

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "0123456789abcdef0123456789abcdef"
START_TIMEOUT = 120.0
SMALL = ("control.enabled=false", "pool.ranks=1")
pytestmark = pytest.mark.timeout(500)  # a job takes a minute on a quiet machine, several on a busy one
PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "node-manager-port",
    "object-manager-port",
)


@dataclass(frozen=True)
class Head:
    """A Ray head of our own."""

    url: str
    env: Dict[str, str]
    """Environment of a client that may submit."""
    process: subprocess.Popen[bytes]


def free_ports(number: int) -> List[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def environment() -> Dict[str, str]:
    """Ours without what would lead to another cluster; this interpreter is `python`, and the code is importable."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env["PYTHONPATH"] = str(ROOT)
    return {**env, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


def wait_for(head: Head, log: Path) -> None:
    request = urllib.request.Request(f"{head.url}/api/version", headers={"Authorization": f"Bearer {TOKEN}"})
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        assert head.process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(request, timeout=5.0) as answer:
                assert answer.status == 200
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"no dashboard within {START_TIMEOUT:.0f} s:\n{log.read_text()}")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    env = {**environment(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    # Ray's sockets live below this folder, and their paths must stay short.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
        command += [f"--{name}={number}" for name, number in ports.items()]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--include-dashboard=true"]
        command += [f"--temp-dir={folder}", "--num-cpus=2", "--object-store-memory=80000000"]
        log = Path(folder) / "head.log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, env=env, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
        started = Head(f"http://127.0.0.1:{ports['dashboard-port']}", env, process)
        try:
            wait_for(started, log)
            yield started
        finally:
            process.terminate()
            process.wait(timeout=60)


def client(env: Dict[str, str], cwd: Path, *arguments: str, timeout: float = 400.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )


def check_run(root: Path, name: str) -> None:
    """A finished run directory, and the run and its rounds in MLflow's database."""
    summary = json.loads((root / name / "summary.json").read_text())
    assert len(summary["rounds"]) >= 2
    assert summary["experiences"]["lost"] == summary["experiences"]["duplicates"] == 0
    assert (root / name / "report.html").is_file()
    with sqlite3.connect(root / "mlflow.db") as database:
        tags = "select run_uuid from tags where key = 'mlflow.parentRunId' and value in"
        parents = "select run_uuid from runs where name = ? and status = 'FINISHED'"
        assert len(database.execute(parents, (name,)).fetchall()) == 1
        children = database.execute(f"{tags} ({parents})", (name,)).fetchall()
    assert len(children) == len(summary["rounds"])


def test_submit_runs_on_the_cluster_and_follows_it_to_the_end(head: Head, runs: Path, tmp_path: Path) -> None:
    submit = [
        "-m",
        "cluster.cli",
        "submit",
        "--address",
        head.url,
        "smoke",
        f"run.root={runs}",
        "run.name=sent",
        *SMALL,
    ]
    done = client(head.env, tmp_path, *submit)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "round 2" in done.stdout, "the job's log is shown"
    assert "SUCCEEDED" in done.stdout
    check_run(runs, "sent")


def test_a_plain_ray_job_runs_the_same_command(head: Head, runs: Path, tmp_path: Path) -> None:
    run = ["python", "-m", "cluster.cli", "run", "smoke", f"run.root={runs}", "run.name=plain", *SMALL]
    done = client(head.env, tmp_path, "-m", "ray.scripts.scripts", "job", "submit", "--address", head.url, "--", *run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    check_run(runs, "plain")


def test_a_job_that_fails_fails_the_client(head: Head, tmp_path: Path) -> None:
    done = client(
        head.env, tmp_path, "-m", "cluster.cli", "submit", "--address", head.url, "smoke", "stream.sources=[nowhere]"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "stream.sources" in done.stdout, "the job's own error is shown"
    assert "FAILED" in done.stdout


def test_a_client_that_is_told_to_stop_leaves_the_job_alone(head: Head, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster.cli", "submit", "--address", head.url, "smoke"]
    command += [f"ray.python={_script(tmp_path, 'echo asleep; exec sleep 300')}"]
    with subprocess.Popen(command, env=head.env, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "asleep" in line:
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(timeout=30) == 1
    assert "the job goes on" in rest
    stop = next(line for line in rest.splitlines() if "ray job stop" in line).split("ray job ", 1)[1].split()
    status = client(head.env, tmp_path, "-m", "ray.scripts.scripts", "job", "status", *stop[1:])
    assert "RUNNING" in status.stdout + status.stderr
    stopped = client(head.env, tmp_path, "-m", "ray.scripts.scripts", "job", *stop)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr


@pytest.mark.parametrize("silently", [False, True], ids=["reset", "silence"])
def test_a_log_that_breaks_off_is_shown_whole(head: Head, tmp_path: Path, silently: bool) -> None:
    counting = _script(tmp_path, "for i in $(seq 12); do echo line $i.; sleep 0.2; done")
    with Cutter(int(head.url.rsplit(":", 1)[1]), b"line 6.", silently) as cutter:
        submit = ["-m", "cluster.cli", "submit", "--address", cutter.url, "smoke", f"ray.python={counting}"]
        done = client(head.env, tmp_path, *submit)
    assert cutter.cut.is_set()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("line")] == [
        f"line {i}." for i in range(1, 13)
    ]


class Cutter:
    """A TCP proxy that cuts the connection, or silently stops serving it, when it first hands on certain bytes."""

    def __init__(self, port: int, trigger: bytes, silently: bool) -> None:
        self.port, self.trigger, self.silently, self.cut = port, trigger, silently, threading.Event()
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"

    def __enter__(self) -> Cutter:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.server.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.port))
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
                if self.trigger in data and not self.cut.is_set():
                    self.cut.set()
                    if self.silently:
                        return
                    source.shutdown(socket.SHUT_RDWR)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return


def _script(folder: Path, body: str) -> Path:
    """An interpreter that runs `body`, whatever it is asked to run."""
    script = folder / "interpreter"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return script


@pytest.mark.parametrize("token", ["", "f" * 32], ids=["none", "wrong"])
def test_without_the_token_nothing_is_submitted(head: Head, tmp_path: Path, token: str) -> None:
    env = environment() | (
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    )
    done = client(env, tmp_path, "-m", "cluster.cli", "submit", "--address", head.url, "smoke")
    assert done.returncode == 2
    assert "RAY_AUTH_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("localhost", "http://HOST:8265"),
        ("ray://127.0.0.1:10001", "http://HOST:8265"),
        ("http://127.0.0.1:1", "start the cluster"),
    ],
)
def test_an_address_without_a_dashboard_is_refused(tmp_path: Path, address: str, message: str) -> None:
    done = client(environment(), tmp_path, "-m", "cluster.cli", "submit", "--address", address, "smoke")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_job_gets_absolute_paths_and_its_own_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = load_config("smoke", ["stream.path=texts", "stream.sources=[]", "base.sources=[]", "ray.address=auto"])
    job = job_config(cfg)
    assert job.run.root == str(tmp_path / "runs")
    assert job.stream.path == str(tmp_path / "texts")
    assert job.base.checkpoint is None
    assert job.tokenizer.path is None
    assert job.ray.address is None
    assert job_config(job) == job


def test_submission_ids_tell_runs_configurations_and_attempts_apart() -> None:
    first, other = load_config("smoke"), load_config("smoke", ["run.seed=1"])
    named = load_config("smoke", ["run.name=a b"])
    ids = {submission_id(first, 0.0), submission_id(first, 1.0), submission_id(other, 0.0), submission_id(named, 0.0)}
    assert len(ids) == 4
    assert submission_id(first, 0.0) == submission_id(first, 0.9)
    assert submission_id(named, 0.0).startswith("a-b-")
    assert submission_id(named, 0.0).endswith("19700101-000000")
