"""The ledger: what the machine has decided goes to state file, journal, audit log and tracker.

One replacement of the state file makes a decision count, with its audit entries in it; then those entries go to the
audit log. Whatever a crash left out of the log is made up for by `recover`, nothing is doubled.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence

from cluster.driver.state import save_state
from cluster.storage.releases import Release, Releases
from pipelines.machine.actions import Action, Commit, Record, TrackRelease, TrackRound, Unpin
from pipelines.machine.records import ReleaseFact, RoundRecord
from pipelines.machine.state import RunState
from pipelines.report.audit import FILE, AuditLog, Chain
from pipelines.wake.report import PINNED

if TYPE_CHECKING:  # it loads Ray, which a rollback has no use for
    from cluster.actors.tracking_client import TrackingClient


class Ledger:
    """Carries out what a machine wants kept. Two things in the state file are its own: the end of the audit log, and
    the seconds of the phases, since the machine has no clock.

    Args:
        state: as it was loaded.
        emit: writes an event to the journal.
        tracking: client of the tracker; None where MLflow is told otherwise.
    """

    def __init__(
        self,
        run_dir: Path,
        state: RunState,
        emit: Callable[..., Any],
        tracking: Optional[TrackingClient] = None,
    ) -> None:
        self.run_dir, self.emit, self.tracking = run_dir, emit, tracking
        self.releases = Releases(run_dir / "releases")
        self.log = AuditLog(run_dir / FILE)
        self.audit, self.seconds = dict(state.audit), dict(state.seconds)
        self.phase, self.since = state.phase, time.perf_counter()

    def recover(self) -> int:
        """Make up for what a crash cut off the audit log; returns how many entries are in neither state nor file."""
        return self.log.write(self.audit["unwritten"]) if self.audit else 0

    def carry_out(self, actions: Sequence[Action]) -> None:
        """Carry out those of the actions that are the ledger's, in order."""
        for action in actions:
            if isinstance(action, Commit):
                self.commit(action)
            elif isinstance(action, Record):
                self.record(action)
            elif isinstance(action, Unpin):
                self.unpin(action)
            elif isinstance(action, TrackRound) and self.tracking is not None:
                self.tracking.finish_round(action.record.to_json(), self.releases)
            elif isinstance(action, TrackRelease) and self.tracking is not None:
                self.tracking.register(action.release, self.releases)

    def commit(self, action: Commit) -> None:
        """Save the state with the audit entries that belong to it, then write those."""
        if action.entries:
            chain = Chain(**self.audit)
            chain.begin()
            for entry in action.entries:
                chain.add(entry.kind, **entry.body)
            self.audit = asdict(chain)
        self.tick()
        self.phase = action.state.phase
        save_state(self.run_dir, replace(action.state, audit=self.audit, seconds=self.seconds))
        if action.entries:
            self.log.write(self.audit["unwritten"])

    def tick(self) -> None:
        """Put the time since the last call down to the phase of the state that was saved last."""
        now = time.perf_counter()
        self.seconds[self.phase.value] = self.seconds.get(self.phase.value, 0.0) + now - self.since
        self.since = now

    def record(self, action: Record) -> None:
        """A line of the journal; the tracker has of it what it draws."""
        fields = action.fields
        if action.kind == "audit_damaged":
            fields = {**fields, "remedy": f"restore {FILE} from a copy"}
        self.emit(action.kind, **fields)
        if self.tracking is None:
            return
        if action.kind == "matrix_row":
            scores = {f"probe_bpb/{source}": value for source, value in fields["row"].items()}
            self.tracking.log_metrics(scores, fields["tokens"])
        elif action.kind == "wake":
            metrics = {"wake/tokens_per_second": fields["tokens_per_second"], "wake/release": float(fields["release"])}
            for step in fields["steps"]:
                metrics.update({f"online_bpb/{source}": value for source, value in step["bpb"].items()})
                metrics.update({f"recalled_bpb/{source}": value for source, value in step["recalled"].items()})
            self.tracking.log_metrics(metrics, fields["tokens"])

    def unpin(self, action: Unpin) -> None:
        """Remove the fast weights that marks up to a stream position pinned.

        A learner that replays may write some anew; nobody reads them, and the next decision removes them.
        """
        waiting = {Path(name).name for name in action.keep}
        for path in (self.run_dir / "checkpoints").glob(f"{PINNED}*.safetensors"):
            tokens = int(path.name.removeprefix(PINNED).partition("-")[0])
            if path.name not in waiting and tokens <= action.tokens:
                path.unlink(missing_ok=True)

    def audit_end(self) -> Dict[str, Any]:
        """Length and head of the audit log so far, which a release keeps."""
        return {key: self.audit[key] for key in ("length", "head") if key in self.audit}


def fact_of(release: Release) -> ReleaseFact:
    """What the machine must know of a release."""
    made = release.number > 0 and release.restores is None
    record = RoundRecord.from_json(release.record) if made else None
    place = (release.number, release.last_key, release.tokens, release.fingerprint)
    return ReleaseFact(*place, record, release.restores)


def known_heads(releases: Releases) -> Dict[int, str]:
    """What the releases remember of the audit log: its head by its length."""
    heads: Dict[int, str] = {}
    for number in releases.numbers():
        audit: Dict[str, Any] = releases.read(number).audit
        if audit:
            heads[int(audit["length"])] = str(audit["head"])
    return heads


def audit_errors(releases: Releases, entries: List[Dict[str, Any]]) -> List[str]:
    """Releases that are not the ones that the log says were promoted or restored."""
    errors, told = [], {e["release"]: e["fingerprint"] for e in entries if e["kind"] in ("promotion", "rollback")}
    for number in releases.numbers()[1:]:
        if number not in told:
            errors.append(f"release {number} is there, but the log knows of no decision for it")
        elif releases.read(number).fingerprint != told[number]:
            errors.append(f"release {number} is not the one that the log says went live")
    return errors
