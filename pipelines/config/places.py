"""Where a run lives and what it puts up with there: tracking, failures, the cluster; part of its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Optional

from nl_model.checks import above, at_least
from pipelines.config.paths import uri_from_home

LEAST_OBJECT_STORE_MB = 75
"""Ray starts no smaller one."""


@dataclass(frozen=True)
class TrackingConfig:
    """Where MLflow keeps what a run measures."""

    uri: Optional[str] = None
    """Tracking server; empty: a SQLite database beside the runs."""
    experiment: str = "circadian"
    """Name of the experiment."""
    model_name: str = "circadian"
    """Name of the registered model; promoted releases become its versions, the live one is the alias champion."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", uri_from_home("tracking.uri", self.uri))


@dataclass(frozen=True)
class FailureConfig:
    """Budgets: how often a part may die before the run gives up (each counted on its own); 0: never."""

    learner: int = 3
    """Restarts of the online learner; 0: none."""
    pool: int = 3
    """Restarts of the consolidation pool, per round; 0: none."""
    services: int = 3
    """Restarts of the experience service and the tracker together; 0: none."""
    call_timeout: float = 120.0
    """Seconds after which a silent actor counts as dead."""

    def __post_init__(self) -> None:
        for key in ("learner", "pool", "services"):
            at_least(f"failures.{key}", getattr(self, key), 0)
        above("failures.call_timeout", self.call_timeout, 0)


@dataclass(frozen=True)
class RayConfig:
    """The Ray cluster the run lives on."""

    address: Optional[str] = None
    """An existing cluster; empty: one that the run starts here and stops again (or, inside a Ray job, the job's)."""
    object_store_mb: int = 128
    """Object store of a cluster started here, in MiB."""
    python: str = "python"
    """Interpreter of the cluster that `circadian submit` starts the run with; `~/` is a home over there."""
    learner_cpus: float = 0.5
    """CPUs that the learner asks the cluster for; 0: it runs wherever there is room."""
    rank_cpus: float = 0.5
    """CPUs that each rank of the pool, and each control, asks for; 0: as above."""
    gpus: float = 1.0
    """GPUs that the learner, each rank and each control ask for where compute.device is cuda; 0: as above."""
    learner_resource: Optional[str] = None
    """A custom resource that pins the learner to nodes of a kind (see ray_cluster.yaml)."""
    pool_resource: Optional[str] = None
    """A custom resource that pins the pool to nodes of a kind."""

    def __post_init__(self) -> None:
        at_least("ray.object_store_mb", self.object_store_mb, LEAST_OBJECT_STORE_MB)
        for key in ("learner_cpus", "rank_cpus", "gpus"):
            at_least(f"ray.{key}", getattr(self, key), 0)

    def pool_bundle(self, gpu: bool) -> Dict[str, float]:
        """What one rank of the pool asks the cluster for."""
        bundle: Dict[str, float] = {"CPU": self.rank_cpus}
        if gpu:
            bundle["GPU"] = self.gpus
        if self.pool_resource:
            bundle[self.pool_resource] = 1.0
        return bundle
