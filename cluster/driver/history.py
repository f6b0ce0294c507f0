"""A run's history after the fact: the lock on its directory, rollback, and the check of its audit log."""

from __future__ import annotations

import fcntl
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cluster.actors.tracking_arguments import tracking_arguments
from cluster.driver.ledger import Ledger, audit_errors, fact_of, known_heads
from cluster.driver.state import load_state
from cluster.storage.releases import Release, Releases, copy_release, inspect_shard
from pipelines.config.load import load_config
from pipelines.config.schema import Config
from pipelines.machine.decisions import enter_rollback
from pipelines.machine.rules import Rules
from pipelines.machine.state import STATE_FILE, Phase, RunState
from pipelines.report.audit import FILE, GENESIS, Verification, read_audit, verify
from pipelines.report.events import EventLog
from pipelines.report.status import check_run_dir
from pipelines.report.tracking import Tracking

logger = logging.getLogger(__name__)
ATTEMPTS = 10
"""How often a lock is asked for again, a fifth of a second in all: `status` holds it for a moment when it looks."""


@dataclass(frozen=True)
class Rollback:
    """What a rollback did."""

    release: Release
    """The new live release."""
    replaced: int
    """Release that was live before."""
    seconds: float
    """Until the old weights were live again."""


def hold_lock(run_dir: Path) -> IO[str]:
    """Take the lock of a run directory until the returned file is closed; ValueError where another process has it."""
    lock = open(run_dir / ".lock", "a")  # noqa: SIM115 (held by the caller)
    for attempts_left in range(ATTEMPTS, -1, -1):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if attempts_left:
                time.sleep(0.02)
    lock.close()
    raise ValueError(f"{run_dir} is being run by another process; wait for it or choose another run.name")


def rollback(run_dir: Path, to: int) -> Rollback:
    """Make the weights of an earlier release live again, as a new release; history only grows.

    The new release holds the same tensors as release `to`, bit by bit, and its last key: what was experienced since
    counts as recent again in the next round. The same `run` command goes on from there; the learner adopts it then.
    MLflow is told by `announce`.

    Raises:
        ValueError: no such run or release, it is live already, it is damaged, or the run is going on.
    """
    start = time.perf_counter()
    cfg = _read_config(run_dir)
    with hold_lock(run_dir):
        state, releases = load_state(run_dir), Releases(run_dir / "releases")
        release = _publish(releases, state, to)
        replaced = state.live
        _enter(cfg, run_dir, state, release)
    return Rollback(release, replaced, time.perf_counter() - start)


def verify_audit(run_dir: Path) -> Verification:
    """Check a run's audit log against itself, the coordinator's state and the releases; ValueError for no run."""
    check_run_dir(run_dir)
    state, releases = load_state(run_dir), Releases(run_dir / "releases")
    length, head = int(state.audit.get("length", 0)), str(state.audit.get("head", GENESIS))
    found = verify(run_dir / FILE, length, head, known_heads(releases))
    if state.live or state.audit:
        found.errors.extend(audit_errors(releases, read_audit(run_dir / FILE)))
    return found


def _read_config(run_dir: Path) -> Config:
    check_run_dir(run_dir)
    return load_config(str(run_dir / "config.yaml"))


def _publish(releases: Releases, state: RunState, to: int) -> Release:
    """Publish the release that makes release `to` live again. One that a crash left unentered is taken as it is."""
    numbers = releases.numbers()
    if not numbers or not state.rows:
        raise ValueError(f"{releases.path.parent} has no live release yet; let the run finish its base first")
    newest = releases.read(numbers[-1])
    if newest.number > state.live:
        if newest.restores == to:
            return newest
        raise ValueError(
            f"release {newest.number} is published but not entered ({STATE_FILE}); run the same command first"
        )
    if to not in numbers:
        raise ValueError(f"--to {to} is no release of this run; there are {', '.join(map(str, numbers))}")
    if to == state.live:
        raise ValueError(f"--to {to} is live already")
    old, directory = releases.read(to), releases.directory(to)
    _check_shards(directory, old)
    copy_release(directory, releases.prepare(numbers[-1] + 1))
    new = Release(
        number=numbers[-1] + 1,
        parent=state.live,
        round=old.round,
        snapshot=old.snapshot,
        last_key=old.last_key,
        tokens=old.tokens,
        fingerprint=old.fingerprint,
        shards=old.shards,
        record={"decision": "rollback", "restores": to, "replaces": state.live},
        restores=to,
        audit={key: state.audit[key] for key in ("length", "head") if key in state.audit},
    )
    _check_shards(releases.directory(new.number), new)
    releases.publish(new)
    return new


def _check_shards(directory: Path, release: Release) -> None:
    """ValueError unless every shard has the checksum of the index and finite tensors."""
    for shard in release.shards:
        facts = inspect_shard(directory / shard.file)
        if facts.sha256 != shard.sha256:
            found = facts.sha256 or "no file"
            raise ValueError(
                f"{directory / shard.file} is damaged: sha256 {found}, the index says {shard.sha256}; "
                "restore it from a copy, or go back to another release"
            )
        bad = sorted(name for name, tensor in facts.tensors.items() if not tensor.finite)
        if bad:
            raise ValueError(f"{directory / shard.file} holds {bad[0]!r}, which is not finite; go back to another one")


def _enter(cfg: Config, run_dir: Path, state: RunState, release: Release) -> None:
    with EventLog(run_dir / "events.jsonl") as journal:
        rules = Rules.of(cfg, tuple(state.rows[0]["bpb"]))
        Ledger(run_dir, state, journal.emit).carry_out(enter_rollback(state, rules, fact_of(release)))


def announce(run_dir: Path, release: Release) -> bool:
    """Tell MLflow of a rollback: a new model version, which the alias champion moves to. Returns whether it took it;
    else it hears of it when the run goes on."""
    cfg, state = _read_config(run_dir), load_state(run_dir)
    tracking = Tracking(**tracking_arguments(cfg, run_dir))
    directory = Releases(run_dir / "releases").directory(release.number)
    tracking.register_release(directory, release.number, None, release.fingerprint)
    complete = tracking.finish("FINISHED" if state.phase is Phase.FINISHED else "KILLED")
    if not complete:
        logger.warning("MLflow did not take the rollback; the alias champion moves once the run goes on")
    return complete
