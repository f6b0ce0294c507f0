"""Rates taken in turns with a reference, so that what slows the machine down for a while slows both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Dict, List

import torch

from benchmarks.tables import Spread

Visit = Callable[[], float]
"""Does a few steps and returns the seconds that one token took: of this thread's CPU, or of a GPU."""


@dataclass(frozen=True)
class Variant:
    """One way to spend a step."""

    step: Callable[[], object]
    tokens: int
    """Tokens learned from (or read) per step."""
    steps: int = 2
    """Steps per visit."""
    begin: Callable[[], object] = lambda: None
    """Called before every visit, untimed."""
    parameters: int = 0


@dataclass(frozen=True)
class Rate:
    """How fast one way is."""

    tokens_per_s: Spread
    """Tokens per CPU-second, or per second of a GPU."""
    ratio: Spread
    """By the reference's just before and just after, visit by visit."""


def timed(way: Variant, device: torch.device) -> Visit:
    """Visits of a way."""

    def visit() -> float:
        way.begin()
        start = clock(device)
        for _ in range(way.steps):
            way.step()
        return (clock(device) - start) / (way.steps * way.tokens)

    return visit


@contextmanager
def one_thread() -> Iterator[None]:
    """CPU work on one thread, as CPU-seconds ask for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def clock(device: torch.device) -> float:
    """Seconds of this process's CPU; for a GPU wall seconds at which it has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def interleave(reference: Visit, visits: Mapping[str, Visit], repeats: int) -> Dict[str, Rate]:
    """Rates of all visits, and of the reference by its name "reference"; ValueError for repeats < 1."""
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    seconds: Dict[str, List[float]] = {name: [] for name in ("reference", *visits)}
    ratios: Dict[str, List[float]] = {name: [] for name in visits}
    for _ in range(repeats):
        before = reference()
        seconds["reference"].append(before)
        for name, visit in visits.items():
            spent = visit()
            after = reference()
            seconds[name].append(spent)
            seconds["reference"].append(after)
            ratios[name].append((before + after) / 2 / spent)
            before = after
    rates = {name: Spread.of(1 / s for s in found) for name, found in seconds.items()}
    steady = {"reference": Spread(1.0, 1.0, 1.0), **{name: Spread.of(found) for name, found in ratios.items()}}
    return {name: Rate(rates[name], steady[name]) for name in rates}
