"""MLflow, written from one place: one run for the stream, a nested run per round, one model version per release.

MLflow may be slow, or away. What cannot be written now waits here, bounded, and is tried again at the next flush; a
caller never fails because of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import posixpath
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Optional

from pipelines.report.tracking_uri import database_of

# Set before mlflow is imported (lazily, it takes seconds); what the user exported wins.
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # its stack traces say no more than our one warning
    # MLflow's own defaults hold a caller for minutes when a server is away; here the buffer waits instead.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
for _key, _value in _DEFAULTS.items():
    os.environ.setdefault(_key, _value)

BATCH = 1000  # most metrics MLflow takes per request
MAX_PARAMS = 100
MAX_KEY = 250
MAX_VALUE = 6000
MAX_POINTS = 100_000
ALIAS = "champion"
STATUSES = ("FINISHED", "FAILED", "KILLED")
_PASSING = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED", "ABORTED")

logger = logging.getLogger(__name__)


class Point(NamedTuple):
    """One value of one metric, waiting to be written. round_id is None for the run of the stream."""

    round_id: Optional[int]
    key: str
    value: float
    timestamp: int
    step: int


class Tracking:
    """The MLflow run of one training run. Not safe for threads; one process owns it.

    run_id: MLflow id of the stream's run, None until MLflow was reached.
    pending: points and operations waiting for the next flush. dropped: those given up.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        model_name: str,
        run_name: str,
        artifact_root: Path,
        params: Mapping[str, Any],
        config_path: Path,
        run_id: Optional[str] = None,
    ) -> None:
        """Continue the run tagged `circadian.run=run_name` of the same directory and configuration, else create one.

        uri: MLflow tracking URI. artifact_root: where artifacts go, unless uri is a server (which keeps its own).
        params: at most 100 are logged, values cut at 6,000 characters; config_path is kept whole as an artifact.
        run_id: the run to prefer where several qualify.
        Raises ValueError if config_path is missing or MLflow refuses the settings. That MLflow is away raises nothing.
        """
        if not Path(config_path).is_file():
            raise ValueError(f"config_path={config_path} is not a file; write the resolved configuration there first")
        self.uri, self.experiment, self.model_name, self.run_name = uri, experiment, model_name, run_name
        self.run_id: Optional[str] = None
        self.dropped = 0
        self._has_server = uri.startswith(("http://", "https://"))
        self._artifact_root = Path(artifact_root).resolve()
        self._config_path = Path(config_path).resolve()
        self._config_hash = hashlib.sha256(self._config_path.read_bytes()).hexdigest()[:16]
        self._params = _clean_params(params)
        self._wanted_run_id = run_id
        self._points: deque[Point] = deque()
        self._operations: deque[tuple[str, Callable[[], None]]] = deque()
        self._rounds: dict[int, str] = {}
        self._last: dict[tuple[Optional[int], str], tuple[int, float]] = {}
        self._open: set[int] = set()
        self._away = False
        self._refused: set[str] = set()
        try:
            self._connect()
        except self._errors as error:
            if not _passes(error):
                raise ValueError(
                    f"MLflow refused tracking.uri={uri!r}, tracking.experiment={experiment!r}: {error}; "
                    "correct them, or leave tracking.uri empty for a database beside the runs"
                ) from error
            self._note_away(error)

    @property
    def pending(self) -> int:
        """Points and operations that wait for the next flush."""
        return len(self._points) + len(self._operations)

    def log_metrics(self, metrics: Mapping[str, float], step: int, round_id: Optional[int] = None) -> None:
        """Buffer metrics (names such as `online_bpb/cpp`) at a step, for the run of a round if round_id is given.

        Steps of one name only grow: a value behind the last one is a replay and is skipped when it is written. A full
        buffer gives up its oldest point. Nothing is sent before flush().
        """
        now = int(time.time() * 1000)
        for key, value in metrics.items():
            if len(self._points) >= MAX_POINTS:
                self._points.popleft()
                self.dropped += 1
            self._points.append(Point(round_id, _clean_key(key), float(value), now, int(step)))

    def start_round(
        self, round_id: int, snapshot_version: int, store_path: Path, params: Mapping[str, Any]
    ) -> Optional[str]:
        """Open the nested run of a round, with the snapshot of the experience store as its dataset.

        Doing so again continues it. Returns its MLflow id, None while MLflow is away.
        """
        self._submit("round", partial(self._open_round, round_id, snapshot_version, Path(store_path), dict(params)))
        return self._rounds.get(round_id)

    def finish_round(self, round_id: int, metrics: Mapping[str, float], decision: str) -> None:
        """Close a round's run with its closing figures and the gate's decision."""
        self.log_metrics(metrics, step=0, round_id=round_id)
        self._submit("round's end", partial(self._close_round, round_id, decision))

    def register_release(self, release_dir: Path, number: int, round_id: Optional[int], digest: str) -> None:
        """Make a release a version of the model and move the alias `champion` to it. Again: only moves the alias."""
        self._submit("release", partial(self._register, Path(release_dir).resolve(), number, round_id, digest))

    def log_artifact(self, path: Path) -> None:
        """Keep a file with the stream's run. Raises ValueError if there is no such file."""
        if not Path(path).is_file():
            raise ValueError(f"artifact {path} is not a file; write it before logging it")
        file = str(Path(path).resolve())
        self._submit("artifact", lambda: self._client.log_artifact(self.run_id, file))

    def flush(self) -> bool:
        """Write what waits, at most 1,000 points per request. Returns whether nothing is left waiting."""
        reached = self._reach()
        if reached:
            self._drain()
        groups: dict[Optional[int], list[Point]] = {}
        for point in self._points:
            groups.setdefault(point.round_id, []).append(point)
        kept: list[Point] = []
        for round_id, points in groups.items():
            for start in range(0, len(points), BATCH):
                batch = points[start : start + BATCH]
                run_id = self.run_id if round_id is None else self._rounds.get(round_id)
                if run_id is None and reached and not self._operations:
                    self.dropped += len(batch)  # a round that was never opened, or that MLflow refused
                elif run_id is None or not reached:
                    kept.extend(batch)
                elif not self._attempt("batch of metrics", partial(self._write, run_id, batch), len(batch)):
                    reached = False
                    kept.extend(batch)
        self._points = deque(kept)
        return not self.pending

    def finish(self, status: str = "FINISHED") -> bool:
        """Flush and close the run (FINISHED, FAILED or KILLED). Returns whether MLflow has everything."""
        if status not in STATUSES:
            raise ValueError(f"status={status!r} is unknown; use one of {', '.join(STATUSES)}")
        self.flush()
        self._submit("end of the run", partial(self._terminate, status))
        return not self.pending

    # What may wait is a queue of operations in order, each safe to repeat.

    def _submit(self, what: str, operation: Callable[[], None]) -> None:
        self._operations.append((what, operation))
        # While MLflow is away only flush() tries it again, so that callers are not held up by each of its timeouts.
        if not self._away and self._reach():
            self._drain()

    def _drain(self) -> None:
        while self._operations and self._attempt(*self._operations[0]):
            self._operations.popleft()

    def _reach(self) -> bool:
        try:
            self._connect()
        except self._errors as error:
            self._note_away(error)
            return False
        return True

    def _attempt(self, what: str, operation: Callable[[], None], worth: int = 1) -> bool:
        """Run an operation. False: MLflow is away, keep it. True: it is done, or was refused for good and counted."""
        try:
            operation()
        except self._errors as error:
            if _passes(error):
                self._note_away(error)
                return False
            self.dropped += worth
            if what not in self._refused:
                logger.warning("MLflow refused a %s, which is left out (said once): %s", what, error)
                self._refused.add(what)
        if self._away:
            logger.info("MLflow at %s answers again", self.uri)
            self._away = False
        return True

    def _note_away(self, error: BaseException) -> None:
        if not self._away:
            logger.warning("MLflow at %s cannot be reached; values wait here until it can: %s", self.uri, error)
        self._away = True

    @cached_property
    def _errors(self) -> tuple[type[Exception], ...]:
        from mlflow.exceptions import MlflowException  # noqa: PLC0415
        from requests.exceptions import RequestException  # noqa: PLC0415
        from sqlalchemy.exc import OperationalError  # noqa: PLC0415
        from urllib3.exceptions import HTTPError  # noqa: PLC0415

        return (MlflowException, RequestException, HTTPError, OperationalError, OSError)

    @cached_property
    def _client(self) -> Any:
        from mlflow import MlflowClient  # noqa: PLC0415

        return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    def _create_once(self, create: Callable[[], Any]) -> None:
        """Create a named thing that another run may be creating right now."""
        try:
            create()
        except self._errors as error:
            if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
                raise

    # The run of the stream.

    def _connect(self) -> None:
        if self.run_id is not None:
            return
        database = database_of(self.uri)
        if database is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
        experiment_id = self._experiment_id()
        tags = {
            "circadian.run": self.run_name,
            "circadian.dir": str(self._config_path.parent),
            "circadian.config": self._config_hash,
            "mlflow.source.name": "circadian",
        }
        # The hash needs no quoting in a filter; the other tags are compared here.
        found = self._client.search_runs([experiment_id], f"tags.`circadian.config` = '{self._config_hash}'")
        same = [run for run in found if all(run.data.tags.get(key) == value for key, value in tags.items())]
        same.sort(key=lambda run: run.info.run_id != self._wanted_run_id)
        run = same[0] if same else self._client.create_run(experiment_id, run_name=self.run_name, tags=tags)
        run_id = run.info.run_id
        self._client.update_run(run_id, status="RUNNING")
        self._log_params(run, self._params)
        if not self._client.list_artifacts(run_id, "config"):
            self._client.log_artifact(run_id, str(self._config_path), "config")
        self._remember(None, run)
        self.run_id = run_id

    def _experiment_id(self) -> str:
        location = None if self._has_server else self._artifact_root.as_uri()
        if self._client.get_experiment_by_name(self.experiment) is None:
            self._create_once(partial(self._client.create_experiment, self.experiment, artifact_location=location))
        return self._client.get_experiment_by_name(self.experiment).experiment_id

    def _log_params(self, run: Any, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param  # noqa: PLC0415

        # Params cannot change once written; a run that continues keeps the ones it has.
        fresh = [Param(key, value) for key, value in params.items() if key not in run.data.params]
        self._client.log_batch(run.info.run_id, params=fresh)

    def _remember(self, round_id: Optional[int], run: Any) -> None:
        for metric in run.data.to_proto().metrics:
            self._last[round_id, metric.key] = (metric.step, metric.value)

    def _write(self, run_id: str, batch: list[Point]) -> None:
        from mlflow.entities import Metric  # noqa: PLC0415

        last: dict[tuple[Optional[int], str], tuple[int, float]] = {}
        fresh = []
        for point in batch:
            place = (point.round_id, point.key)
            if _is_new(point, last.get(place, self._last.get(place))):
                last[place] = (point.step, point.value)
                fresh.append(Metric(point.key, point.value, point.timestamp, point.step))
        if fresh:
            self._client.log_batch(run_id, metrics=fresh)
        self._last.update(last)

    def _terminate(self, status: str) -> None:
        for round_id in sorted(self._open):
            self._client.set_terminated(self._rounds[round_id], status="KILLED")
        self._open.clear()
        self._client.set_terminated(self.run_id, status=status)

    # Rounds and releases.

    def _open_round(self, round_id: int, snapshot_version: int, store_path: Path, params: dict[str, Any]) -> None:
        experiment_id = self._experiment_id()
        tags = {"mlflow.parentRunId": str(self.run_id), "circadian.round": str(round_id)}
        tags["circadian.snapshot"] = str(snapshot_version)
        found = self._client.search_runs(
            [experiment_id], f"tags.`mlflow.parentRunId` = '{self.run_id}' and tags.`circadian.round` = '{round_id}'"
        )
        run = found[0] if found else self._client.create_run(experiment_id, run_name=f"round {round_id}", tags=tags)
        run_id = run.info.run_id
        self._client.update_run(run_id, status="RUNNING")
        self._log_params(run, _clean_params(params))
        self._client.log_inputs(run_id, datasets=[_snapshot_input(store_path, snapshot_version)])
        self._remember(round_id, run)
        self._rounds[round_id] = run_id
        self._open.add(round_id)

    def _close_round(self, round_id: int, decision: str) -> None:
        if run_id := self._rounds.get(round_id):  # else its opening was refused, which was said then
            self._client.set_tag(run_id, "circadian.decision", decision)
            self._client.set_terminated(run_id, status="FINISHED")
            self._open.discard(round_id)

    def _register(self, release_dir: Path, number: int, round_id: Optional[int], digest: str) -> None:
        parent = str(self.run_id)
        run_id = parent if round_id is None else self._rounds.get(round_id, parent)
        self._create_once(partial(self._client.create_registered_model, self.model_name))
        found = self._client.search_model_versions(
            f"tags.`circadian.parent` = '{parent}' and tags.`circadian.release` = '{number}'"
        )
        version = next((item.version for item in found if item.name == self.model_name), None)
        if version is None:
            tags = {"circadian.parent": parent, "circadian.run": self.run_name, "circadian.release": str(number)}
            tags |= {"circadian.digest": digest, "circadian.dir": str(release_dir), "circadian.round": str(round_id)}
            source = self._source(run_id, release_dir, number, digest)
            version = self._client.create_model_version(self.model_name, source, run_id, tags=tags).version
        self._client.set_registered_model_alias(self.model_name, ALIAS, version)

    def _source(self, run_id: str, release_dir: Path, number: int, digest: str) -> str:
        if not self._has_server:
            return release_dir.as_uri()
        # A server takes no path of this machine as a source, so it gets a note that points there.
        note = {"release": number, "path": str(release_dir), "digest": digest}
        self._client.log_dict(run_id, note, f"releases/{number:06d}/release.json")
        return f"runs:/{run_id}/releases/{number:06d}"


def _passes(error: BaseException) -> bool:
    """Whether an error of MLflow may be gone at the next try."""
    code = getattr(error, "error_code", None)
    return code in _PASSING if code is not None else not isinstance(error, FileNotFoundError)


def _is_new(point: Point, last: Optional[tuple[int, float]]) -> bool:
    if last is None or point.step != last[0]:
        return last is None or point.step > last[0]
    return point.value != last[1] and not (math.isnan(point.value) and math.isnan(last[1]))


def _clean_key(key: str) -> str:
    """A name MLflow takes: other characters than letters, digits, and _-. :/ are spelt out, so names stay distinct."""
    spelt = {"+": "plus", "#": "sharp"}
    key = re.sub(r"[^/\w.\- :]", lambda match: spelt.get(match[0], f"_{ord(match[0]):x}"), key)
    key = posixpath.normpath(key.replace("..", "_").lstrip("/"))
    return key if len(key) <= MAX_KEY else f"{key[: MAX_KEY - 9]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def _clean_params(params: Mapping[str, Any]) -> dict[str, str]:
    return {_clean_key(key): str(value)[:MAX_VALUE] for key, value in list(params.items())[:MAX_PARAMS]}


def _snapshot_input(store_path: Path, version: int) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag  # noqa: PLC0415

    uri = Path(store_path).resolve().as_uri()
    # MLflow keeps one data set per name and digest in an experiment, so the store is part of the digest.
    digest = f"{version}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"
    dataset = Dataset("experience-store", digest, source_type="local", source=json.dumps({"uri": uri}))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "consolidation")])
