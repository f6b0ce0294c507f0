"""All trials of a comparison: tuning first, then seeds and orders; what is done already is not done again."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Set, Tuple, TypeVar

from nl_model.model import NestedLM
from pipelines.compare.config import METHODS, REGIMES, VARIANTS, Method
from pipelines.compare.material import Material, load_material
from pipelines.compare.names import head_of, is_changed, lr_of, method_of
from pipelines.compare.options import EXTRA_RATES, Options
from pipelines.compare.trial import WAIT, Key, Workshop
from pipelines.config.schema import Config

OURS, ABLATION = "circadian", "circadian_"
Report = Callable[[str, int, int, Dict[str, Any]], None]
"""Called with (what, trials done, trials planned, the trial's result)."""


Name = TypeVar("Name")
Result = TypeVar("Result")


class BusyError(Exception):
    """Another process is doing the trial."""


@dataclass(frozen=True)
class Chosen:
    """A method as tuning left it."""

    method: Method
    lr: float
    tried: List[Tuple[str, float, float]]
    """(variant, step size, mean final bits per byte) of every tuning trial."""


class Comparison:
    """Runs the trials that `Options` ask for.

    Args:
        cfg: model, stream and sleep.
        options: what to compare.
        path: folder of trials and bases; several processes may work on the same one.
        frozen: what an earlier comparison has chosen; these methods are not tuned again.
    """

    def __init__(
        self, cfg: Config, options: Options, path: Path, report: Report, frozen: Optional[Mapping[str, Chosen]] = None
    ) -> None:
        self.cfg, self.options, self.report, self.frozen = cfg, options, report, frozen or {}
        limit = round(cfg.stream.max_source_bytes * options.tuning_share)
        shorter = replace(cfg, stream=replace(cfg.stream, max_source_bytes=limit))
        self.shop, self.tuning_shop = Workshop(path, cfg), Workshop(path, shorter)
        self.material: Dict[Tuple[str, bool], Material] = {}
        self.counted: Set[Tuple[Key, bool]] = set()
        self.extra: Set[Tuple[str, float]] = set()

    def run(self) -> Tuple[Dict[str, Chosen], Dict[Tuple[str, str, str, int], Dict[str, Any]]]:
        """Tune every method, then run it everywhere; returns choices and results by (regime, method, order, seed)."""
        options = self.options
        chosen = {**self.frozen, **_work_off({name: partial(self.tune, name) for name in self._tuned()})}
        for name in options.methods:
            if name not in chosen:  # what changes one thing keeps the step size
                lr = lr_of(name)
                tuned = chosen[head_of(name)].method if head_of(name) in chosen else None
                chosen[name] = Chosen(method_of(name, tuned), chosen[_lends_step(name)].lr if lr is None else lr, [])
        jobs: Dict[Tuple[str, str, str, int], Callable[[], Dict[str, Any]]] = {}
        for seed, order, regime in itertools.product(options.seeds, options.orders, options.regimes):
            for name in options.methods:
                key = self._key(name, chosen[name].method, chosen[name].lr, regime, order, seed)
                jobs[regime, name, order, seed] = partial(self._result, key)
        shown = dict.fromkeys([*options.methods, *self._tuned()])
        return {name: chosen[name] for name in shown}, _work_off(jobs)

    @property
    def done(self) -> int:
        """Trials done so far, those that were done before included."""
        return len(self.counted)

    def _tuned(self) -> List[str]:
        """Methods that are tuned: all but ablations and changed ones, whose step size is that of what they change."""
        wanted = (_lends_step(name) for name in self.options.methods if lr_of(name) is None)
        return [name for name in dict.fromkeys(wanted) if name not in self.frozen]

    def tune(self, name: str) -> Chosen:
        """The best step size on order A with the tuning seed, then the best variant of the method at it.

        Tuning reads the first part of every source (`Options.tuning_share`).
        """
        variants = VARIANTS.get(name, {"": METHODS[name]})
        first = next(iter(variants))
        tried: List[Tuple[str, float, float]] = []

        def final(variant: str, lr: float) -> float:
            options = self.options
            key = self._key(name, variants[variant], lr, options.tuned_in, "A", options.tuning_seed, tuning=True)
            value = float(self._result(key, tuning=True)["mean_final_bpb"])
            tried.append((variant, lr, value if math.isfinite(value) else math.inf))
            return tried[-1][2]

        found = {rate: final(first, rate) for rate in self.options.grid}
        for _ in range(EXTRA_RATES):
            lr = min(found, key=lambda rate: found[rate])
            beyond = {min(found): lr / 2, max(found): lr * 2}.get(lr)
            if beyond is None or len(self.options.grid) == 1:
                break
            self.extra.add((name, beyond))
            found[beyond] = final(first, beyond)
        lr = min(found, key=lambda rate: found[rate])
        best = found[lr]
        winner = first
        for variant in list(variants)[1:]:
            if (value := final(variant, lr)) < best:
                winner, best = variant, value
        return Chosen(variants[winner], lr, tried)

    def _key(
        self, name: str, method: Method, lr: float, regime: str, order: str, seed: int, tuning: bool = False
    ) -> Key:
        if not method.keeps_data and not REGIMES[regime].asleep:
            regime = "whole"  # nothing is stored, so nothing changes
        options, data = self.options, self._material(order, tuning).fingerprint
        return Key(name, method, lr, regime, order, seed, options.epochs, options.scratch, data)

    def _result(self, key: Key, tuning: bool = False) -> Dict[str, Any]:
        shop = self.tuning_shop if tuning else self.shop
        if (found := shop.read(key)) is None:
            if not shop.claim(key):
                raise BusyError(key.name)
            found = shop.run(key, self._material(key.order, tuning))
        if (key, tuning) in self.counted:
            return found
        self.counted.add((key, tuning))
        what = f"{'tuning ' if tuning else ''}{key.name} {key.regime} {key.order} seed {key.seed} lr {key.lr:g}"
        self.report(what, self.done, self.planned(), found)
        return found

    def _material(self, order: str, tuning: bool = False) -> Material:
        shop = self.tuning_shop if tuning else self.shop
        if (order, tuning) not in self.material:
            self.material[order, tuning] = load_material(shop.cfg, order, self.options.scratch)
        return self.material[order, tuning]

    def parameters(self) -> int:
        """Parameters of the network that all methods train."""
        vocab = self._material(self.options.orders[0]).vocab_size
        return sum(p.numel() for p in NestedLM(self.cfg.model, self.cfg.levels, vocab).parameters())

    def planned(self) -> int:
        """How many trials the whole comparison has, as far as tuning knows, those done included."""
        options = self.options
        tuning = sum(len(options.grid) + len(VARIANTS.get(n, {"": 0})) - 1 for n in self._tuned())
        return (
            tuning
            + len(self.extra)
            + len(options.methods) * len(options.regimes) * len(options.orders) * len(options.seeds)
        )


def _lends_step(name: str) -> str:
    """The method whose step size one takes: an ablation Circadian's, a changed one its head's, all others their own."""
    head = head_of(name)
    return OURS if head.startswith(ABLATION) else head


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
    """What the comparison behind an outcome has chosen, ablations and changed methods left out (they follow others).

    Circadian's own family has no variants to choose from: its settings are those of `METHODS`.
    """
    found = {}
    for name, entry in outcome["tuning"]["chosen"].items():
        if not name.startswith(ABLATION) and not is_changed(name):
            settings = {key: value for key, value in entry["method"].items() if key != "night"}
            method = METHODS[name] if settings["family"] == "circadian" else Method(**settings)
            found[name] = Chosen(method, entry["lr"], [tuple(t) for t in entry["tried"]])
    return found
