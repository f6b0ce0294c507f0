"""How a run ends early, and what an error of a remote part says. Who may be restarted how often is the machine's."""

from __future__ import annotations

from ray.exceptions import RayError, RayTaskError


class RunFailed(RuntimeError):
    """The run cannot go on by itself. What was committed is safe; the same command continues it."""


class Stopped(BaseException):
    """The run was asked to stop; all it learned is committed. No Exception: nothing that handles those may eat it."""


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
