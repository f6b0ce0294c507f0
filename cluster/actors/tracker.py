"""Actor `Tracker`: the only MLflow writer of a run. Calls queue up here and never hold up a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Optional

from pipelines.report.tracking import Tracking


class Tracker:
    """Holds one `Tracking`; methods have its names and arguments."""

    def __init__(self, arguments: Dict[str, Any]) -> None:
        self.tracking = Tracking(**arguments)

    def run_id(self) -> Optional[str]:
        """Id of the parent run; None as long as MLflow is out of reach."""
        return self.tracking.run_id

    def log_metrics(self, metrics: Dict[str, float], step: int) -> None:
        """Buffer metrics of the parent run and write them."""
        self.tracking.log_metrics(metrics, step)
        self.tracking.flush()

    def start_round(self, round_id: int, snapshot_version: int, store_path: str, params: Dict[str, Any]) -> None:
        """Open the child run of a round."""
        self.tracking.start_round(round_id, snapshot_version, Path(store_path), params)

    def finish_round(self, round_id: int, metrics: Dict[str, float], decision: str) -> None:
        """Close the child run of a round."""
        self.tracking.finish_round(round_id, metrics, decision)

    def register_release(self, release_dir: str, number: int, round_id: int, digest: str) -> None:
        """Make a release a model version and move the alias champion to it."""
        self.tracking.register_release(Path(release_dir), number, round_id, digest)

    def finish(self, status: str, artifacts: list[str]) -> bool:
        """Log artifacts, write everything and end the parent run; False where MLflow did not take all of it."""
        for path in artifacts:
            self.tracking.log_artifact(Path(path))
        return self.tracking.finish(status)
