"""A run as a Ray job: hand it in, follow its log, tell how it ended."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import signal
import socket
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, AsyncIterator, Optional
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from rich.console import Console

from pipelines.config.load import config_hash, to_yaml
from pipelines.config.schema import Config

CONNECT_TIMEOUT = 10.0
"""Seconds after which a dashboard that does not answer counts as unreachable."""
RECONNECTS = 30
"""Times in a row that a lost log may be picked up again without a new line."""
PAUSE = 2.0
"""Seconds between two attempts."""
SILENCE = 10.0
"""Seconds without a new line after which the job itself is asked for."""
OVERRIDING = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
FILE = "config.yaml"


def job_config(cfg: Config) -> Config:
    """The configuration as the job gets it.

    A job starts in a folder of its own, so relative paths (run.root, stream.path, base.checkpoint, tokenizer.path) are
    resolved against the folder that `submit` was called in. They must lie on storage that the cluster sees under the
    same name. ray.address is dropped: a job belongs to its cluster.
    """
    # `~` in them was the home of whoever submits, and is written out already: as `run` and `validate` here mean it. A
    # home that only the cluster has can be given by its whole path. ray.python alone means a place over there.
    return replace(
        cfg,
        run=replace(cfg.run, root=str(Path(cfg.run.root).resolve())),
        stream=replace(cfg.stream, path=_absolute(cfg.stream.path)),
        base=replace(cfg.base, checkpoint=_absolute(cfg.base.checkpoint)),
        tokenizer=replace(cfg.tokenizer, path=_absolute(cfg.tokenizer.path)),
        ray=replace(cfg.ray, address=None),
    )


def _absolute(path: Optional[str]) -> Optional[str]:
    return path and str(Path(path).resolve())


def submission_id(cfg: Config, moment: float) -> str:
    """Name of a submission: the run's name, a hash of its configuration, and the UTC second it was handed in."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", cfg.run.name)
    return f"{name}-{config_hash(cfg)[:8]}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(moment))}"


def submit_run(cfg: Config, address: str, console: Console) -> int:
    """Hand a run in, follow its log, and wait for its end.

    Circadian must be installed in the environment of `ray.python` on the cluster's head. A job is not retried by Ray;
    submitting the same run again continues it. Ctrl-C or SIGTERM ends the following, not the job.

    Args:
        cfg: configuration; see `job_config` for its paths.
        address: the cluster's dashboard, http://host:8265. It wins over RAY_ADDRESS.

    Returns:
        0 where the job succeeded, 1 where it did not, or where its end was not waited for.

    Raises:
        ValueError: nothing answers at `address`, it is no Ray dashboard, or it wants another token.
    """
    client = connect(address)
    job = job_config(cfg)
    name = submission_id(job, time.time())
    stop_hint = f"ray job stop {name} --address {address}"
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        submit(client, job, name)
        _say(console, f"submitted {name}; run directory {Path(job.run.root) / job.run.name}")
        asyncio.run(follow(client, name, console))
        details = client.get_job_info(name)
    except KeyboardInterrupt:
        _say(console, f"no longer following {name}; the job goes on. To stop it: {stop_hint}")
        return 1
    except OSError as error:
        console.print(
            f"lost the cluster ({_first_line(error)}); the job may go on. To stop it: {stop_hint}", soft_wrap=True
        )
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    _say(console, f"{name}: {details.status.value}")
    if details.status == JobStatus.SUCCEEDED:
        return 0
    _say(console, details.message or "")
    return 1


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster's job server; ValueError with the remedy where there is none."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"--address {address!r} is no dashboard address; use http://HOST:8265, as `ray start` prints it"
        )
    hint = f"start the cluster, or name the dashboard's host and port (8265 unless changed) instead of {address}"
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=CONNECT_TIMEOUT).close()
    except (OSError, ValueError) as error:
        raise ValueError(f"no Ray dashboard answers at --address {address} ({_first_line(error)}); {hint}") from None
    for variable in OVERRIDING:  # Ray would let them win over the address on the command line
        os.environ.pop(variable, None)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ValueError(_unauthorized(address, error)) from None
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"what answers at --address {address} is no Ray dashboard ({_first_line(error)}); {hint}"
        ) from None


def submit(client: JobSubmissionClient, job: Config, name: str) -> None:
    """Send the configuration and the command that runs it; ValueError where the cluster refuses."""
    with tempfile.TemporaryDirectory(prefix="circadian-") as folder:
        (Path(folder) / FILE).write_text(to_yaml(job), encoding="utf-8")
        try:
            client.submit_job(
                entrypoint=f"{_over_there(job.ray.python)} -m cluster.cli run {FILE}",
                submission_id=name,
                runtime_env={"working_dir": folder},
                metadata={"run": job.run.name, "config_hash": config_hash(job)},
            )
        except AuthenticationError as error:
            raise ValueError(_unauthorized(client.get_address(), error)) from None
        except RuntimeError as error:
            raise ValueError(f"the cluster refused the job: {_first_line(error)}") from None


def _over_there(interpreter: str) -> str:
    """A word of the cluster's shell; its `~/` is left to that shell, since the home it means is over there."""
    if interpreter.startswith("~/"):
        return f"~/{shlex.quote(interpreter[2:])}"
    return shlex.quote(interpreter)


async def follow(client: JobSubmissionClient, name: str, console: Console) -> None:
    """Print the job's log until it has ended; a connection that breaks is picked up where it was."""
    printed, failures = 0, 0
    while True:
        passed = 0
        try:
            async for text in _tail(client, name):
                new = text[max(0, printed - passed) :]
                passed += len(text)
                if new:
                    printed, failures = printed + len(new), 0
                    console.out(new, end="", highlight=False)
            problem: Exception = ConnectionError("the log ended before the job")
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            problem = error
        try:
            if client.get_job_status(name).is_terminal():
                console.out(client.get_job_logs(name)[printed:], end="", highlight=False)
                return
        except (RuntimeError, OSError) as error:
            problem = error
        failures += 1
        if failures > RECONNECTS:
            raise ConnectionError(_first_line(problem))
        await asyncio.sleep(PAUSE)


async def _tail(client: JobSubmissionClient, name: str) -> AsyncIterator[str]:
    """The log from its beginning. Ray's own iterator waits for ever on a connection that died without a word; this one
    looks after the job when nothing comes, and gives up with ConnectionError once that has ended."""
    log = aiter(client.tail_job_logs(name))
    while True:
        piece = asyncio.ensure_future(anext(log, None))
        while not (await asyncio.wait({piece}, timeout=SILENCE))[0]:
            if client.get_job_status(name).is_terminal():
                piece.cancel()
                raise ConnectionError("the log fell silent")
        text = piece.result()
        if text is None:
            return
        yield text


def _unauthorized(address: str, error: AuthenticationError) -> str:
    return (
        f"the cluster at {address} wants another token ({_first_line(error)}); set RAY_AUTH_MODE=token, and "
        "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token (`ray get-auth-token` prints it on the head)"
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
