"""The outcome of a comparison: one JSON that machines read. Figures in bits per byte."""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Mapping, Sequence, Tuple

import numpy as np

from pipelines.compare.methods import method_of
from pipelines.compare.options import Options
from pipelines.compare.runner import Cell, Chosen
from pipelines.gate.bootstrap import mean_interval

OURS = "circadian"
SCORES = ("final_bpb", "area_bpb", "worst_bpb", "gap_bpb", "released_bpb", "learning", "forgetting")
READINGS = ("online_bpb", "recalled_bpb")
SHOWN = ("final_bpb", "area_bpb", "learning", "forgetting", *READINGS)
"""Figures in which the measured method's lead over the others is given with its interval."""


def build_outcome(
    options: Options, chosen: Mapping[str, Chosen], results: Mapping[Cell, Mapping[str, Any]], command: str
) -> Dict[str, Any]:
    """Everything that a comparison found, by regime and method, JSON-able."""
    return {
        "command": command,
        "seeds": list(options.seeds),
        "orders": list(options.orders),
        "epochs": options.epochs,
        "clock": options.clock,
        "tuning": {
            "grid": list(options.grid),
            "most": options.most,
            "seed": options.tuning_seed,
            "order": "A",
            "regime": options.tuned_in,
            "share": options.tuning_share,
            "chosen": {name: _described(name, found) for name, found in chosen.items()},
        },
        "regimes": {regime: _regime(options, results, regime) for regime in options.regimes},
    }


def _described(name: str, chosen: Chosen) -> Dict[str, Any]:
    method = method_of(name)
    keys = {"strategy": method.strategy, "changes": dict(method.changes)}
    hook = {"hook": method.hook, "settings": dict(method.settings)}
    return {"lr": chosen.lr, "edge": chosen.edge, "tried": [list(one) for one in chosen.tried], **keys, **hook}


def _regime(options: Options, results: Mapping[Cell, Mapping[str, Any]], regime: str) -> Dict[str, Any]:
    """By figure and method; what a method does not have (joint training has no stream) is left out."""
    trials: Dict[str, List[Mapping[str, Any]]] = {
        name: [results[regime, name, order, seed] for seed in options.seeds for order in options.orders]
        for name in options.methods
    }
    found: Dict[str, Any] = {}
    for key in (*SCORES, *READINGS, "stored_bytes", "seconds"):
        found[key] = {name: float(np.mean(values)) for name, values in columns(trials, key).items()}
    for kind in ("wake", "sleep", "total"):
        found[f"{kind}_steps"] = {
            name: float(np.mean([t["steps_per_token"][kind] for t in ts])) for name, ts in trials.items()
        }
    found["rounds"] = {name: _rounds(ts) for name, ts in trials.items()}
    by_seed = {key: {n: _per_seed(v, options) for n, v in columns(trials, key).items()} for key in SHOWN}
    found["interval"] = {name: _ends(values) for name, values in by_seed["final_bpb"].items()}
    measure = measured(options.methods)
    found["against"] = {
        key: {name: _lead(values[measure], other) for name, other in values.items() if name != measure}
        for key, values in by_seed.items()
        if measure in values
    }
    found["trials"] = {name: [_trial(t) for t in ts] for name, ts in trials.items()}
    return found


def columns(trials: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> Dict[str, List[float]]:
    """One figure of every trial by method; methods of which a trial lacks it are left out."""
    found = {name: [trial.get(key) for trial in ts] for name, ts in trials.items()}
    return {name: [float(v) for v in vs if v is not None] for name, vs in found.items() if vs and None not in vs}


def measured(methods: Iterable[str]) -> str:
    """The method whose lead over the others is shown: Circadian, or the first one where it is not among them."""
    methods = list(methods)
    return OURS if OURS in methods else methods[0]


def _per_seed(values: Sequence[float], options: Options) -> List[float]:
    """Means over orders: trials of a seed share their base, so a seed is what can be resampled."""
    return [float(mean) for mean in np.reshape(values, (len(options.seeds), len(options.orders))).mean(1)]


def _ends(values: Sequence[float]) -> Tuple[float, float]:
    found = mean_interval(values)
    return found.low, found.high


def _lead(ours: Sequence[float], theirs: Sequence[float]) -> Dict[str, float]:
    """Mean of theirs - ours over seeds, with its 95 % interval: above zero, ours is lower."""
    found = mean_interval([b - a for a, b in zip(ours, theirs, strict=True)])
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _rounds(trials: Sequence[Mapping[str, Any]]) -> Dict[str, int]:
    return {word: sum(t.get("rounds", {}).get(word, 0) for t in trials) for word in ("promoted", "rejected")}


def _trial(trial: Mapping[str, Any]) -> Dict[str, Any]:
    kept = ("matrix", "rows", "sources", "curve", "looks", "rounds", "flops", "steps_per_token")
    about = {key: trial["key"][key] for key in ("seed", "order", "lr")}
    return {key: trial.get(key) for key in (*SCORES, *READINGS, *kept)} | about
