"""The ranks of the consolidation pool as one thing: start them, rank them, call them, kill them.

Methods that start with `async_` return object references and do not block.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Callable, Dict, List

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors.start import results, start_actor, whole_bundle
from cluster.driver.failures import cause_of, describe, is_users
from cluster.pool.worker import ConsolidationWorker
from pipelines.config.schema import Config

logger = logging.getLogger(__name__)
LOG_EVERY = 15.0


class PoolError(RuntimeError):
    """The pool could not be started, or one of its ranks died; the whole group is gone."""


class WorkerGroup:
    """N `ConsolidationWorker` actors in one process group."""

    def __init__(self, cfg: Config, run_dir: str, tokenizer_state: Dict[str, Any]) -> None:
        self.cfg, self.arguments = cfg, (cfg, run_dir, tokenizer_state)
        self.bundle = cfg.ray.pool_bundle(cfg.compute.device == "cuda")
        """What one rank takes."""
        self.workers: List[Any] = []
        self.group: PlacementGroup | None = None
        self.pids: List[int] = []
        self.backend = ""

    @property
    def started(self) -> bool:
        """Whether the ranks exist."""
        return bool(self.workers)

    def start(self, keep_waiting: Callable[[], bool] = lambda: True) -> None:
        """Place the ranks, order them by node and GPU, form the group. PoolError where that fails or takes too long."""
        cfg = self.cfg
        self.group = placement_group([self.bundle] * cfg.pool.ranks, strategy="PACK")
        try:
            self._wait_for_placement(keep_waiting)
            workers = [
                start_actor(
                    ConsolidationWorker,
                    *self.arguments,
                    control=True,
                    **whole_bundle(self.bundle),
                    scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=i),
                )
                for i in range(cfg.pool.ranks)
            ]
            self.workers = workers
            where = results([w.whereabouts.remote() for w in workers], cfg.pool.start_timeout)
            # Ranks follow (node, GPU), not the order of bundles, so that neighbours share a node.
            order = sorted(range(len(workers)), key=lambda i: (where[i]["ip"], where[i]["node"], where[i]["gpu"], i))
            self.workers = [workers[i] for i in order]
            self.pids = [where[i]["pid"] for i in order]
            port = results([self.workers[0].free_port.remote()], cfg.pool.start_timeout)[0]
            address = where[order[0]]["ip"]
            joins = [w.join.remote(r, len(workers), address, port) for r, w in enumerate(self.workers)]
            self.backend = results(joins, cfg.pool.start_timeout)[0]
        except (RayError, RuntimeError, TimeoutError) as error:
            self.kill()
            raise PoolError(f"the consolidation pool did not start: {describe(error)}") from error

    def _wait_for_placement(self, keep_waiting: Callable[[], bool]) -> None:
        assert self.group is not None
        start = last = time.monotonic()
        ready = self.group.ready()
        while not ray.wait([ready], timeout=0.2)[0]:
            now = time.monotonic()
            if not keep_waiting():
                raise PoolError("stopped while waiting for the pool's place")
            if now - start > self.cfg.pool.start_timeout:
                raise PoolError(
                    f"no place for pool.ranks={self.cfg.pool.ranks} x {self.bundle} within "
                    f"pool.start_timeout={self.cfg.pool.start_timeout:.0f} s; the cluster has "
                    f"{ray.cluster_resources()}, free are {ray.available_resources()}"
                )
            if now - last > LOG_EVERY:
                logger.warning(
                    "waiting for a place for %d ranks; free: %s", self.cfg.pool.ranks, ray.available_resources()
                )
                last = now

    def async_call(self, method: str, *args: Any) -> List[Any]:
        """Call a method on every rank; returns one reference per rank, in order."""
        return [getattr(worker, method).remote(*args) for worker in self.workers]

    def call(self, method: str, *args: Any) -> List[Any]:
        """Call a method on every rank and wait. PoolError where a rank fails; the group is killed then."""
        return self.collect(self.async_call(method, *args))

    def collect(self, references: List[Any]) -> List[Any]:
        """Wait for results of all ranks; one failure kills the group, because the others would wait for ever."""
        try:
            return results(references)
        except RayError as error:
            self.kill()
            if is_users(error):  # bad data stays bad, a full disk full: no use in trying again
                raise cause_of(error) from None
            raise PoolError(f"a rank of the consolidation pool failed: {describe(error)}") from error

    def kill(self) -> None:
        """End all ranks at once and give their place back."""
        for worker in self.workers:
            ray.kill(worker)
        self.workers, self.pids = [], []
        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None
