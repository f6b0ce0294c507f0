"""The driver's side of the tracker: fire and forget, restarted within the budget of the services."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Dict, List

import ray
from ray.exceptions import GetTimeoutError, RayError

from cluster.actors.start import results, start_actor
from cluster.actors.tracker import Tracker
from cluster.driver.failures import describe
from cluster.storage.releases import Releases

logger = logging.getLogger(__name__)
MAX_IN_FLIGHT = 200


class TrackingClient:
    """Sends what is to be tracked. A tracker that dies is started again; nobody waits for it but `finish`.

    What comes while MAX_IN_FLIGHT calls are under way is left out.
    """

    def __init__(self, arguments: Dict[str, Any], restarts: int) -> None:
        self.arguments, self.restarts = arguments, restarts
        self.in_flight: List[Any] = []
        self.actor = start_actor(Tracker, arguments, num_cpus=0)

    def _send(self, method: str, *args: Any) -> None:
        self._reap()
        if len(self.in_flight) < MAX_IN_FLIGHT:
            self.in_flight.append(getattr(self.actor, method).remote(*args))

    def _reap(self) -> None:
        done, self.in_flight = (
            ray.wait(self.in_flight, num_returns=len(self.in_flight), timeout=0) if self.in_flight else ([], [])
        )
        for reference in done:
            try:
                ray.get(reference)
            except RayError as error:
                logger.warning("tracker: %s", describe(error))
                if isinstance(error, ray.exceptions.ActorDiedError):
                    self._restart()
                    return

    def _restart(self) -> None:
        self.in_flight = []
        if self.restarts > 0:
            self.restarts -= 1
            self.actor = start_actor(Tracker, self.arguments, num_cpus=0)

    def log_metrics(self, metrics: Dict[str, float], step: int) -> None:
        """Metrics of the parent run at a stream position."""
        self._send("log_metrics", metrics, step)

    def start_round(self, round_id: int, snapshot: int, store_path: str, params: Dict[str, Any]) -> None:
        """Open the child run of a round."""
        self._send("start_round", round_id, snapshot, store_path, params)

    def finish_round(self, record: Dict[str, Any], releases: Releases) -> None:
        """Close the child run of a round; a promoted release becomes a model version and the champion."""
        figures, number = record["figures"], record["release"]
        metrics = {f"loss/{name}": value for name, value in record["loss"].items()}
        metrics.update({f"candidate_bpb/{s}": v for s, v in figures["candidate"].items()})
        metrics.update(seconds=record["seconds"], steps=record["steps"], mean_change=figures["mean_change"])
        metrics.update(_gate_metrics(record))
        self._send("finish_round", record["id"], metrics, record["decision"])
        if number is not None:
            digest = releases.read(number).fingerprint
            self._send("register_release", str(releases.directory(number)), number, record["id"], digest)

    def register(self, number: int, releases: Releases) -> None:
        """Make a release that no round made a model version and the champion."""
        digest = releases.read(number).fingerprint
        self._send("register_release", str(releases.directory(number)), number, None, digest)

    def finish(self, status: str, artifacts: List[Path], timeout: float) -> bool:
        """Write all that is left and end the parent run; waits for it, but not longer than `timeout` seconds. Returns
        whether MLflow took everything."""
        self._reap()
        try:
            [complete] = results([self.actor.finish.remote(status, [str(path) for path in artifacts])], timeout)
        except (RayError, GetTimeoutError) as error:
            logger.warning("tracking is incomplete: %s; look at tracking.uri", describe(error))
            return False
        if not complete:
            logger.warning("tracking is incomplete: MLflow did not take everything; look at tracking.uri")
        return bool(complete)


def _gate_metrics(record: Dict[str, Any]) -> Dict[str, float]:
    """The gate's figures as metrics of a round: checks passed, worst change and its interval, divergence, plan."""
    figures = {check["name"]: check["figures"] for check in record["figures"]["checks"]}
    metrics = {f"gate/{key}": float(record[key]) for key in ("recent_scale", "lr_scale")}
    metrics["gate/checks_passed"] = float(sum(check["passed"] for check in record["figures"]["checks"]))
    if "forgetting" in figures:
        worst = figures["forgetting"]["worst"]
        metrics.update({f"gate/worst_{key}": float(worst[key]) for key in ("mean", "low", "high")})
    if "divergence" in figures:
        metrics["gate/divergence"] = float(figures["divergence"]["mean"])
    return metrics
