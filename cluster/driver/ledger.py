"""The ledger: enters decisions into the run's state, journal, audit log and tracker, in an order that a crash may cut.

A release is published first. Then one replacement of the state file makes the decision count, with its audit entries in
it; then those entries go to the audit log. Whatever a crash left out is made up for by `recover`, nothing is doubled.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence

from cluster.driver.state import PINNED, RunState
from cluster.storage.releases import Release, Releases
from pipelines.config.schema import Config
from pipelines.machine.replan import Adjustment, adjustment
from pipelines.report.audit import FILE, AuditLog, Chain
from pipelines.wake.report import Mark

if TYPE_CHECKING:  # both load Ray, which a rollback has no use for
    from cluster.actors.tracking_client import TrackingClient

FIGURES = ("mean_change", "worst", "recent", "checks")
"""Of a decision's figures, those that stand in the audit log beside the scores."""


class Ledger:
    """The only one that enters decisions.

    Args:
        sources: all sources of the run, in order.
        emit: writes an event to the journal.
        tracking: client of the tracker; None where MLflow is told otherwise.
    """

    def __init__(
        self,
        cfg: Config,
        run_dir: Path,
        state: RunState,
        sources: Sequence[str],
        emit: Callable[..., Any],
        tracking: Optional[TrackingClient] = None,
    ) -> None:
        self.cfg, self.run_dir, self.state, self.sources = cfg, run_dir, state, sources
        self.emit, self.tracking = emit, tracking
        self.releases = Releases(run_dir / "releases")
        self.log = AuditLog(run_dir / FILE)

    def adjustment(self) -> Adjustment:
        """What the decisions so far change in the next round's plan."""
        return adjustment([record["decision"] for record in self.state.rounds], self.cfg.gate)

    def best(self) -> Dict[str, float]:
        """Best bits per byte of any row so far, by source."""
        return {source: min(row["bpb"][source] for row in self.state.rows) for source in self.sources}

    def add_row(self, release: int, tokens: int, bpb: Dict[str, float]) -> None:
        """Add a row to the matrix."""
        scores = {source: bpb[source] for source in self.sources}
        self.state.rows.append({"release": release, "tokens": tokens, "bpb": scores})
        self.emit("matrix_row", release=release, tokens=tokens, row=scores)
        if self.tracking is not None:
            self.tracking.log_metrics({f"probe_bpb/{s}": v for s, v in scores.items()}, tokens)

    def queue(self, mark: Mark, running: bool) -> None:
        """Queue a round. Rounds that queue up behind a slow pool merge: a later mark covers an earlier one.

        Args:
            running: whether the first one in the queue is running.
        """
        state, first = self.state, int(running)
        state.queue.append(asdict(mark))
        state.last_mark = mark.tokens
        while len(state.queue) - first > self.cfg.sleep.max_queued:
            del state.queue[first]
        number = state.next_round + len(state.queue) - 1
        self.emit("round_queued", round=number, **asdict(mark))
        chain = self._chain()
        chain.add("sleep_trigger", tokens=mark.tokens, last_key=mark.last_key, why=mark.why)
        self._save(chain)

    def settle(self, record: Dict[str, Any]) -> None:
        """Enter a decided round; the release, if any, is published already."""
        state, figures, before = self.state, record["figures"], self.adjustment()
        state.queue = [mark for mark in state.queue if mark["tokens"] > record["tokens"]]
        state.rounds.append(record)
        state.next_round = record["id"] + 1
        state.flops["sleep"] += record["flops"]
        self.emit(
            "round_finished", round=record["id"], steps=record["steps"], seconds=record["seconds"], loss=record["loss"]
        )
        gate = {k: record[k] for k in ("decision", "release", "reason", "figures")}
        self.emit("gate", round=record["id"], **gate)
        promoted = record["release"] is not None
        if promoted:
            state.live = record["release"]
            state.consolidated_key = self.releases.read(state.live).last_key
            self.add_row(state.live, record["tokens"], record["row"])
        chain = self._chain()
        told = {k: record[k] for k in ("release", "anchor", "fingerprint", "reason", "recent_scale", "lr_scale")}
        scores = {side: figures[side] for side in ("candidate", "anchor", "awake")}
        chain.add(
            "promotion" if promoted else "rejection",
            round=record["id"],
            figures={**scores, **{k: figures[k] for k in FIGURES}},
            **told,
        )
        self._change_plan(record["id"], before, chain)
        self._save(chain)
        self.unpin(record["tokens"])
        if self.tracking is not None:
            self.tracking.finish_round(record, self.releases)

    def unpin(self, tokens: int) -> None:
        """Remove the fast weights that marks up to a stream position pinned, unless a round in the queue reads them.

        A learner that replays may write some anew; nobody reads them, and the next decision removes them.
        """
        waiting = {Path(mark["fast"]).name for mark in self.state.queue}
        for path in (self.run_dir / "checkpoints").glob(f"{PINNED}*.safetensors"):
            if path.name not in waiting and int(path.name.removeprefix(PINNED).partition("-")[0]) <= tokens:
                path.unlink(missing_ok=True)

    def restored(self, release: Release) -> None:
        """Enter a rollback; its release is published already."""
        assert release.restores is not None
        state, replaced = self.state, self.state.live
        state.live, state.consolidated_key = release.number, release.last_key
        scores = next(row["bpb"] for row in reversed(state.rows) if row["release"] == release.restores)
        self.add_row(release.number, release.tokens, scores)
        told = {
            "release": release.number,
            "restores": release.restores,
            "replaces": replaced,
            "fingerprint": release.fingerprint,
        }
        state.rollbacks.append(told)
        self.emit("rollback", tokens=release.tokens, **told)
        chain = self._chain()
        chain.add("rollback", figures={"bpb": scores}, **told)
        self._save(chain)

    def recover(self) -> None:
        """Make up for what a crash cut off: audit entries, and a release published but not yet entered."""
        missing = self.log.write(self.state.audit.get("unwritten", []))
        if missing:
            self.emit("audit_damaged", missing=missing, remedy=f"restore {FILE} from a copy")
        newest = self.releases.numbers()[-1]
        if newest > self.state.live:
            release = self.releases.read(newest)
            if release.restores is not None:
                self.restored(release)
            else:
                self.settle(release.record)
        live = self.releases.read(self.state.live)
        if live.restores is not None and self.tracking is not None:  # MLflow may have been away when it was restored
            self.tracking.register(live.number, self.releases)

    def _change_plan(self, number: int, before: Adjustment, chain: Chain) -> None:
        """Say so where a decision changes the plan of the rounds to come."""
        after = self.adjustment()
        if after == before:
            return
        sleep = self.cfg.sleep
        reason = f"{after.rejections} rejections in a row" if after.rejections else "a promotion; as configured again"
        told = {
            "reason": reason,
            "recent": sleep.recent * after.recent_scale,
            "lr": sleep.optimizer.lr * after.lr_scale,
        }
        self.emit("plan_changed", after_round=number, **told)
        chain.add("plan_change", round=number, **told)

    def _chain(self) -> Chain:
        chain = Chain(**self.state.audit)
        chain.begin()
        return chain

    def _save(self, chain: Chain) -> None:
        self.state.audit = asdict(chain)
        self.state.save(self.run_dir)
        self.log.write(chain.unwritten)


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
