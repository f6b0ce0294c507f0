"""What MLflow is told about a run as a whole."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict

from pipelines.config.load import config_hash, flatten
from pipelines.config.schema import Config
from pipelines.report.tracking_uri import default_uri

TRACKED = (
    "run.",
    "model.",
    "levels.",
    "sleep.",
    "wake.",
    "when.",
    "pool.",
    "stream.schedule",
    "base.",
    "gate.",
    "compute.",
)


def tracking_arguments(cfg: Config, run_dir: Path) -> Dict[str, Any]:
    """Arguments of `pipelines.report.tracking.Tracking`."""
    root = run_dir.parent
    params = {k: v for k, v in flatten(asdict(cfg)).items() if k.startswith(TRACKED)}
    return {
        "uri": cfg.tracking.uri or default_uri(root),
        "experiment": cfg.tracking.experiment,
        "model_name": cfg.tracking.model_name,
        "run_name": cfg.run.name,
        "artifact_root": root / "mlartifacts",
        "params": {"config_hash": config_hash(cfg), **params},
        "config_path": run_dir / "config.yaml",
    }
