"""Separate restart budgets: each part of a run may die only so often before the run gives up."""

from __future__ import annotations

import logging
from typing import Dict

from ray.exceptions import RayError, RayTaskError

from pipelines.config.schema import FailureConfig

logger = logging.getLogger(__name__)


class RunFailed(RuntimeError):
    """The run cannot go on by itself. What was committed is safe; the same command continues it."""


class Stopped(BaseException):
    """The run was asked to stop; all it learned is committed. No Exception: nothing that handles those may eat it."""


class Budgets:
    """Restarts left, by part: learner, pool, services."""

    def __init__(self, cfg: FailureConfig) -> None:
        self.left: Dict[str, int] = {"learner": cfg.learner, "pool": cfg.pool, "services": cfg.services}
        self.full = dict(self.left)

    def spend(self, part: str, error: BaseException) -> int:
        """Take one restart; returns how many are left. RunFailed when there is none, with the error as cause."""
        if self.left[part] <= 0:
            raise RunFailed(
                f"{part} failed {self.full[part] + 1} times, failures.{part}={self.full[part]} restarts are used up; "
                f"last error: {describe(error)}. Run the same command to continue."
            ) from error
        self.left[part] -= 1
        logger.warning("%s failed (%s); restarting it, %d restarts left", part, describe(error), self.left[part])
        return self.left[part]

    def refill(self, part: str) -> None:
        """Give a part its full budget back (after a round that went well)."""
        self.left[part] = self.full[part]


def cause_of(error: BaseException) -> BaseException:
    """The exception that a remote method raised, or the error itself where an actor died."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def is_users(error: BaseException) -> bool:
    """Whether restarting cannot help: bad input or a full disk, as opposed to a dead process."""
    cause = cause_of(error)
    return isinstance(cause, (ValueError, OSError)) and not isinstance(cause, (RayError, ConnectionError, TimeoutError))


def describe(error: BaseException) -> str:
    """One line about an error."""
    cause = cause_of(error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"[:500]
