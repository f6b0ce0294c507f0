"""The outcome of a comparison: one JSON that machines read, a page with tables for people. Figures in bits per byte."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Dict, Iterable, List, Mapping, Tuple

import numpy as np

from pipelines.compare.config import REGIMES
from pipelines.compare.names import is_changed
from pipelines.compare.options import Options
from pipelines.compare.runner import OURS, Chosen
from pipelines.compare.statistics import columns, gap_closed, interval, paired

Results = Mapping[Tuple[str, str, str, int], Mapping[str, Any]]
SCORES = ("mean_final_bpb", "forgetting", "learning", "online_bpb", "weights_bpb", "recalled_bpb")
READINGS = {"weights_bpb": "weights alone", "recalled_bpb": "with recall"}
"""Online loss by how text is read, whichever way the method reads, and its heading."""
MEANS = (*SCORES, "base_bpb", "stored_bytes", "learner_step", "inline_step", "seconds")


def build_outcome(options: Options, chosen: Mapping[str, Chosen], results: Results, command: str) -> Dict[str, Any]:
    """Everything that a comparison found, by regime and method, JSON-able."""
    return {
        "command": command,
        "seeds": list(options.seeds),
        "orders": list(options.orders),
        "start": "random weights" if options.scratch else "base",
        "epochs": options.epochs,
        "tuning": {
            "grid": list(options.grid),
            "seed": options.tuning_seed,
            "order": "A",
            "regime": options.tuned_in,
            "share": options.tuning_share,
            "chosen": {name: {"lr": c.lr, "method": asdict(c.method), "tried": c.tried} for name, c in chosen.items()},
        },
        "regimes": {regime: _regime(options, results, regime) for regime in options.regimes},
    }


def _regime(options: Options, results: Results, regime: str) -> Dict[str, Any]:
    trials: Dict[str, List[Any]] = {
        name: [results[regime, name, order, seed] for seed in options.seeds for order in options.orders]
        for name in options.methods
    }
    found: Dict[str, Any] = {
        key: {name: float(np.mean(values)) for name, values in columns(trials, key).items()} for key in MEANS
    }
    final = columns(trials, "mean_final_bpb")
    found["interval"] = {name: list(interval(values)) for name, values in final.items()}
    found["flops"] = {name: float(np.mean([t["flops"]["total"] for t in ts])) for name, ts in trials.items()}
    found["trials"] = {
        name: [
            {key: t.get(key) for key in (*SCORES, "matrix", "sources")}
            | {"seed": t["key"]["seed"], "order": t["key"]["order"], "curve": t["curve"]}
            for t in ts
        ]
        for name, ts in trials.items()
    }
    measure = _measure(options.methods)
    found["against"] = {
        key: {name: paired(values[measure], values[name]) for name in values if name not in (measure, *_apart(key))}
        for key in SCORES
        if measure in (values := columns(trials, key))
    }
    if {"naive", "joint"} <= set(final):
        found["gap_closed"] = {name: gap_closed(v, final["naive"], final["joint"]) for name, v in final.items()}
    return found


def _measure(methods: Iterable[str]) -> str:
    """The method whose lead over the others is shown: Circadian, or the first one where it is not among them."""
    methods = list(methods)
    return OURS if OURS in methods else methods[0]


def _apart(key: str) -> Tuple[str, ...]:
    """Methods whose figure means something else: joint training has no order, so it forgets the base alone."""
    return ("joint",) if key == "forgetting" else ()


def page(outcome: Mapping[str, Any]) -> str:
    """The outcome as Markdown, for a chapter of its own."""
    cells = len(outcome["seeds"]) * len(outcome["orders"])
    lines = [
        f"Written by `{outcome['command']}`.",
        "",
        f"Bits per byte, lower is better: means over {len(outcome['seeds'])} seeds x {len(outcome['orders'])} orders "
        f"({', '.join(outcome['orders'])}), {cells} trials per row, with 95 % bootstrap intervals. Every method starts "
        f"from the same {outcome['start']} and spends the FLOPs of {outcome['epochs']:g} plain epochs of the stream"
        f"{' where no heading says less' if any(REGIMES[name].asleep for name in outcome['regimes']) else ''}; "
        f"{_tuned(outcome['tuning'])} (ablations take {OURS}'s{_borrowed(outcome)}).",
        "",
        "Learner: FLOPs that the learner itself spends on the stream, in full training steps per token. In line: FLOPs "
        "that the next batch waits for, whoever spends them.",
    ]
    recalled = any(found.get("recalled_bpb") for found in outcome["regimes"].values())
    lines += ["", RECALL if recalled else "Online: loss of every sequence before it is learned from, weights alone."]
    for regime, found in outcome["regimes"].items():
        lines += ["", f"### {heading(regime)}", "", *_table(found)]
    return "\n".join(lines) + "\n"


RECALL = (
    "Online: loss of every sequence before it is learned from, as the method reads. Where the whole history is stored, "
    f"{OURS} and its ablations (not those on circadian_nights) read together with recall, which says what followed the "
    "same words last time, the sequence before in the same batch included; its index counts as stored. Beside it, for "
    "every method alike: the loss of the weights alone, and with recall."
)


def _tuned(tuning: Mapping[str, Any]) -> str:
    if taken := tuning.get("taken_from"):
        return f"step sizes and variants are those of {taken}, not tuned again"
    if not any(entry["tried"] for entry in tuning["chosen"].values()):
        return "step sizes are those in the names, not tuned"
    return (
        f"step sizes tuned {_inside(tuning)}over {tuning['grid']} (and beyond, where an edge was best) "
        f"on order A, on the first {tuning['share']:.0%} of each source, with a seed of its own, then frozen"
    )


def _inside(tuning: Mapping[str, Any]) -> str:
    return "" if tuning.get("regime", "whole") == "whole" else f"with this store ({tuning['regime']}) "


def _borrowed(outcome: Mapping[str, Any]) -> str:
    changed = any(is_changed(name) for name in outcome["tuning"]["chosen"])
    return ", methods with settings in their name that of the method they change unless they set lr" if changed else ""


def heading(name: str) -> str:
    """A regime as a heading."""
    regime = REGIMES[name]
    store = "the whole history" if regime.stored == float("inf") else f"{100 * regime.stored:g} % of the stream's bytes"
    awake = 100 * (1.0 - regime.asleep)
    return f"Store: {store}" + (f"; of all FLOPs, an awake pass that writes takes {awake:g} %" if regime.asleep else "")


def _table(found: Mapping[str, Any]) -> List[str]:
    measure = _measure(found["mean_final_bpb"])
    readings = {key: words for key, words in READINGS.items() if found.get("recalled_bpb") and found.get(key)}
    head = [
        "method",
        "final mean",
        "95 %",
        f"lead of {measure} (95 %)",
        "learning",
        "forgetting",
        "online",
        *readings.values(),
        "learner",
        "in line",
        "stored",
    ]
    rows = ["| " + " | ".join(head) + " |", "| --- " + "| ---: " * (len(head) - 1) + "|"]
    for name in sorted(found["mean_final_bpb"], key=lambda n: found["mean_final_bpb"][n]):
        low, high = found["interval"][name]
        lead = found.get("against", {}).get("mean_final_bpb", {}).get(name)
        online = [found[key].get(name) for key in ("online_bpb", *readings)]
        cells = [
            f"**{name}**" if name == measure else name,
            f"{found['mean_final_bpb'][name]:.3f}",
            f"{low:.3f} .. {high:.3f}",
            f"{-lead['mean']:+.3f} ({-lead['high']:+.3f} .. {-lead['low']:+.3f})" if lead else "",
            f"{found['learning'][name]:.3f}",
            f"{found['forgetting'][name]:+.3f}",
            *(f"{value:.3f}" if value is not None else "" for value in online),
            f"{found['learner_step'][name]:.2f}",
            f"{found['inline_step'][name]:.2f}" if name in found.get("inline_step", {}) else "",
            f"{found['stored_bytes'][name] / 1024:,.0f} KiB",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    if "gap_closed" in found and OURS in found["gap_closed"]:
        rows += ["", f"Share of the gap from naive to joint that circadian closes: {found['gap_closed'][OURS]:.0%}."]
    return rows
