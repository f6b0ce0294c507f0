"""How actors are started: plain classes, never restarted or retried behind our back (failures.py decides that)."""

from __future__ import annotations

import time
from typing import Any, Dict, List, Mapping, Optional

import ray
from ray.exceptions import GetTimeoutError

from pipelines.config.schema import Config


def start_actor(kind: type, *arguments: Any, control: bool = False, **options: Any) -> Any:
    """Start an actor of a plain class; returns its handle.

    Args:
        kind: the class; its name is the one that `ray list actors` shows.
        control: give it a thread for methods of the concurrency group "control", which may overtake the others.
        options: of Ray's `.options()`, for instance num_cpus.
    """
    groups = {"concurrency_groups": {"control": 1}} if control else {}
    return ray.remote(max_restarts=0, max_task_retries=0, **groups)(kind).options(**options).remote(*arguments)


def whole_bundle(bundle: Mapping[str, float]) -> Dict[str, Any]:
    """Options of an actor that takes all of a bundle of resources."""
    own = {"CPU": "num_cpus", "GPU": "num_gpus"}
    options: Dict[str, Any] = {option: bundle.get(name, 0.0) for name, option in own.items()}
    return {**options, "resources": {name: amount for name, amount in bundle.items() if name not in own}}


def results(references: List[Any], timeout: Optional[float] = None) -> List[Any]:
    """Wait for results, in short slices: between them signals are heard, and the first failure is raised at once.

    Raises:
        GetTimeoutError: not all were there within `timeout` seconds.
        RayError: a call failed or its actor died.
    """
    start, waiting = time.monotonic(), list(references)
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=0.2)
        ray.get(done)
        if waiting and timeout is not None and time.monotonic() - start > timeout:
            raise GetTimeoutError(f"no answer within {timeout:.0f} s")
    return list(ray.get(references))


def configure_torch(cfg: Config) -> None:
    """Threads and determinism of a process that computes."""
    import torch  # noqa: PLC0415 (the services that only log or commit never load it)

    torch.set_num_threads(cfg.compute.threads)
    torch.use_deterministic_algorithms(cfg.run.deterministic, warn_only=True)
