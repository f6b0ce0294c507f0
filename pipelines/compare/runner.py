"""All trials of a comparison: tuning first, then seeds and orders; what is done already is not done again."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Set, Tuple, TypeVar

from nl_model.model import NestedLM
from pipelines.compare.data import TrialData, configured_bytes
from pipelines.compare.methods import is_changed, lends_step, lr_of, method_of
from pipelines.compare.options import REGIMES, Options
from pipelines.compare.trial import Trial, configure
from pipelines.compare.trials import WAIT, Trials, digest
from pipelines.compare.widening import widen
from pipelines.config.schema import Config

Report = Callable[[str, int, int, Dict[str, Any]], None]
"""Called with (what, trials done, trials planned, the trial's result)."""
Load = Callable[[Sequence[str]], Config]
"""A configuration with some overrides laid over it, the strategy among them."""
Cell = Tuple[str, str, str, int]
"""(regime, method, order, seed)."""
SHARED = ("run", "model", "tokenizer", "stream", "base", "compute")
"""Sections that no method may change: text, network and base are the same for all."""
Name = TypeVar("Name")
Result = TypeVar("Result")


class BusyError(Exception):
    """Another process is doing the trial."""


@dataclass(frozen=True)
class Chosen:
    """A step size, and how it was found."""

    lr: Optional[float]
    """None: as configured."""
    tried: Tuple[Tuple[float, float], ...] = ()
    """(step size, final bits per byte) of every tuning trial."""
    edge: str = ""
    """`lowest` or `highest`, where the best step size is at that edge of all that were tried."""


class Comparison:
    """Runs the trials that `Options` ask for.

    Args:
        load: model, stream and everything that methods do not change.
        options: what to compare.
        path: folder of trials and bases; several processes may work on the same one.
        frozen: step sizes that an earlier comparison has chosen; these methods are not tuned again.
    """

    def __init__(
        self, load: Load, options: Options, path: Path, report: Report, frozen: Optional[Mapping[str, Chosen]] = None
    ) -> None:
        self.options, self.report, self.frozen, self.trials = options, report, frozen or {}, Trials(path)
        budget = f"sleep.epochs={options.epochs:g}"
        # A name's own changes come last: they may say otherwise, and then the page's FLOPs do.
        self.cfgs = {name: load([budget, *method_of(name).overrides()]) for name in self._named()}
        self.cfg = next(iter(self.cfgs.values()))
        if self.cfg.base.checkpoint is not None:
            raise ValueError("base.checkpoint has no place in a comparison, which pretrains a base; leave it out")
        self.data: Dict[Tuple[str, bool], TrialData] = {}
        self.counted: Set[str] = set()
        self.extra = 0

    def run(self) -> Tuple[Dict[str, Chosen], Dict[Cell, Dict[str, Any]]]:
        """Tune every method, then run it everywhere; returns choices and results by cell."""
        options = self.options
        self._check()
        tuned = {**self.frozen, **_work_off({name: partial(self.tune, name) for name in self._tuned()})}
        chosen = dict(tuned)
        for name in options.methods:
            own = lr_of(name)
            if own is not None or name not in tuned:
                chosen[name] = Chosen(own) if own is not None else replace(tuned[lends_step(name)], tried=())
        cells = itertools.product(options.regimes, options.methods, options.orders, options.seeds)
        jobs = {cell: partial(self._result, cell, chosen[cell[1]].lr) for cell in cells}
        shown = dict.fromkeys([*options.methods, *self._tuned()])
        return {name: chosen[name] for name in shown}, _work_off(jobs)

    @property
    def done(self) -> int:
        """Trials done so far, those that were done before included."""
        return len(self.counted)

    def _check(self) -> None:
        """ValueError for what only a trial would find out, before any of them has cost something."""
        for order in self.options.orders:
            sources = self._data(order).setting.stream_sources
            if any(REGIMES[name] for name in (*self.options.regimes, self.options.tuned_in)):
                configured_bytes(self.cfg, len(sources))
        for name, cfg in self.cfgs.items():
            unlike = [section for section in SHARED if getattr(cfg, section) != getattr(self.cfg, section)]
            if unlike:
                raise ValueError(
                    f"--methods: {name!r} changes the section {unlike[0]}, which all methods share; give it for all of "
                    "them, as an override of the comparison"
                )
            if method_of(name).hook != "none" and cfg.wake.writes != "all":
                raise ValueError(
                    f"--methods: {name!r} adds something to the learner's training of every level, but "
                    f"wake.writes={cfg.wake.writes}; use wake.writes=all"
                )

    def _named(self) -> List[str]:
        return list(dict.fromkeys([*self.options.methods, *self._tuned()]))

    def _tuned(self) -> List[str]:
        """Methods that are tuned: all but ablations and changed ones, which take the step size of what they change."""
        wanted = (lends_step(name) for name in self.options.methods if lr_of(name) is None)
        return [name for name in dict.fromkeys(wanted) if name not in self.frozen]

    def tune(self, name: str) -> Chosen:
        """The best step size on order A with the tuning seed, in the first part of every source.

        All methods have the same grid and as many trials; it widens while the best one is at an edge of it. A grid of
        one is no question: nothing is tried.
        """
        options = self.options
        if len(options.grid) == 1:
            return Chosen(options.grid[0])
        found: Dict[float, float] = {}
        while (search := widen(options.grid, found, options.most)).next is not None:
            if search.next not in options.grid:
                self.extra += 1
            cell = (options.tuned_in, name, "A", options.tuning_seed)
            value = float(self._result(cell, search.next, tuning=True)["final_bpb"])
            found[search.next] = value if math.isfinite(value) else math.inf
        if search.best is None:
            raise ValueError(f"--grid: {name} diverged at every step size tried, {sorted(found)}; give smaller ones")
        return Chosen(search.best, tuple(sorted(found.items())), search.edge)

    def _result(self, cell: Cell, lr: Optional[float], tuning: bool = False) -> Dict[str, Any]:
        regime, name, order, seed = cell
        trial = self._trial(cell, lr, tuning)
        if (found := self.trials.read(trial)) is None:
            if not self.trials.claim(trial):
                raise BusyError(name)
            about = {"name": name, "lr": lr, "regime": regime, "order": order, "seed": seed}
            found = self.trials.run(trial, about)
        key = digest(trial)
        if key not in self.counted:
            self.counted.add(key)
            step = f"lr {trial.cfg.sleep.optimizer.lr:g}"
            what = f"{'tuning ' if tuning else ''}{name} {regime} {order} seed {seed} {step}"
            self.report(what, self.done, self.planned(), found)
        return found

    def _trial(self, cell: Cell, lr: Optional[float], tuning: bool) -> Trial:
        regime, name, order, seed = cell
        method, data = method_of(name), self._data(order, tuning)
        regime = "whole" if method.joint else regime  # nothing is stored, so nothing changes
        cfg = configure(self._sized(self.cfgs[name], tuning), method, data, regime, seed, lr)
        return Trial(method, cfg, data, self.options.clock, self.options.looks)

    def _sized(self, cfg: Config, tuning: bool) -> Config:
        if not tuning:
            return cfg
        limit = round(cfg.stream.max_source_bytes * self.options.tuning_share)
        return replace(cfg, stream=replace(cfg.stream, max_source_bytes=limit))

    def _data(self, order: str, tuning: bool = False) -> TrialData:
        if (order, tuning) not in self.data:
            self.data[order, tuning] = TrialData.open(self._sized(self.cfg, tuning), order)
        return self.data[order, tuning]

    def parameters(self) -> int:
        """Parameters of the network that all methods train."""
        vocab = self._data(self.options.orders[0]).setting.tokenizer.vocab_size
        return sum(p.numel() for p in NestedLM(self.cfg.model, self.cfg.levels, vocab).parameters())

    def planned(self) -> int:
        """How many trials the whole comparison has, as far as tuning knows, those done included."""
        options = self.options
        cells = len(options.methods) * len(options.regimes) * len(options.orders) * len(options.seeds)
        tuning = len(options.grid) * len(self._tuned()) if len(options.grid) > 1 else 0
        return tuning + self.extra + cells


def _work_off(jobs: Mapping[Name, Callable[[], Result]]) -> Dict[Name, Result]:
    """Do jobs one after the other; one whose trial another process is doing comes again after the others."""
    found: Dict[Name, Result] = {}
    waiting = list(jobs)
    while waiting:
        left = []
        for name in waiting:
            try:
                found[name] = jobs[name]()
            except BusyError:
                left.append(name)
        if len(left) == len(waiting):
            time.sleep(WAIT)
        waiting = left
    return {name: found[name] for name in jobs}


def read_chosen(outcome: Mapping[str, Any]) -> Dict[str, Chosen]:
    """Step sizes that the comparison behind an outcome has tuned."""
    found = {}
    for name, entry in outcome["tuning"]["chosen"].items():
        if entry["tried"] and not is_changed(name):
            found[name] = Chosen(
                float(entry["lr"]), tuple((float(a), float(b)) for a, b in entry["tried"]), entry["edge"]
            )
    return found
