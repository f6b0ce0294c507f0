"""Calls of actors that nobody waits for: references, and what to make of their answers when they come."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Callable, Deque, Dict, Iterator, List, Optional

import ray
from ray.exceptions import GetTimeoutError, RayError


@dataclass(frozen=True)
class Call:
    """A call in flight."""

    reference: Any
    answered: Callable[[Any], Any]
    """Makes an event of the answer."""
    failed: Callable[[Exception], Any]
    """Makes an event of the error, or None."""
    deadline: float
    """Time at which a silent actor counts as dead, by time.monotonic()."""


class Calls:
    """Lines of calls. Those of one line are answered in order; a failed one takes the rest of its line with it."""

    def __init__(self) -> None:
        self.lines: Dict[str, Deque[Call]] = {}

    def add(
        self,
        line: str,
        reference: Any,
        answered: Callable[[Any], Any],
        failed: Callable[[Exception], Any],
        timeout: float = float("inf"),
    ) -> None:
        """Wait for a call, behind the others of its line.

        Args:
            timeout: seconds, counted from now.
        """
        call = Call(reference, answered, failed, time.monotonic() + timeout)
        self.lines.setdefault(line, deque()).append(call)

    def forget(self, line: str) -> None:
        """Nobody waits for a line any more."""
        self.lines.pop(line, None)

    def has(self, line: str) -> bool:
        """Whether something of a line is in flight."""
        return bool(self.lines.get(line))

    def collect(self, timeout: float) -> Iterator[Any]:
        """Events of what has been answered; waits at most `timeout` seconds for the first."""
        heads = {calls[0].reference: line for line, calls in self.lines.items() if calls}
        if not heads:
            time.sleep(timeout)
            return
        done: List[Any] = ray.wait(list(heads), num_returns=1, timeout=timeout)[0]
        for reference in done:
            yield from self._take(heads[reference])
        now = time.monotonic()
        for line in [line for line, calls in self.lines.items() if calls and calls[0].deadline < now]:
            calls = self.lines.pop(line, None)  # what an event before led to may have forgotten it
            if calls:
                yield calls[0].failed(GetTimeoutError("no answer within its time"))

    def _take(self, line: str) -> Iterator[Optional[Any]]:
        call = self.lines[line].popleft()
        try:
            answer = ray.get(call.reference)
        except (RayError, GetTimeoutError) as error:
            self.forget(line)
            yield call.failed(error)
        else:
            yield call.answered(answer)
