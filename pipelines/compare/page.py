"""The outcome of a comparison as Markdown, for a chapter of its own."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping

from pipelines.compare.methods import CHANGE
from pipelines.compare.options import REGIMES
from pipelines.compare.outcome import measured

COLUMNS: Dict[str, str] = {
    "area_bpb": "area",
    "learning": "learning",
    "forgetting": "forgetting",
    "gap_bpb": "gap",
    "online_bpb": "online",
    "recalled_bpb": "with recall",
    "wake_steps": "learner",
    "sleep_steps": "pool",
}
WORDS = (
    "Final: the served model (release and what the learner has written since) at the end, mean over sources. Area: the "
    "same along the stream, over the sources seen so far, mean of all looks. Gap: the most by which it was worse than "
    "the release alone. Learning and forgetting: of the releases. Online: loss of every sequence before it is learned "
    "from; beside it, read together with recall, which every method may. Learner and pool: FLOPs in full training "
    "steps per token of the stream, gate and dreams included. Stored: bytes of text, and what stands beside it, that "
    "is read again."
)


def page(outcome: Mapping[str, Any]) -> str:
    """The page."""
    cells = len(outcome["seeds"]) * len(outcome["orders"])
    lines = [
        f"Written by `{outcome['command']}`, on the machine, learner, rounds and gate of `circadian run`, in simulated "
        "time.",
        "",
        f"Bits per byte, lower is better: means over {len(outcome['seeds'])} seeds x {len(outcome['orders'])} orders "
        f"({', '.join(outcome['orders'])}), {cells} trials per row, with 95 % bootstrap intervals over seeds. Every "
        f"method starts from the same base and has a budget of {outcome['epochs']:g} full training steps per token, "
        f"wake and sleep together; {tuned(outcome['tuning'])}.",
        "",
        WORDS,
    ]
    for regime, found in outcome["regimes"].items():
        lines += ["", f"### {heading(regime)}", "", *_table(found)]
    return "\n".join(lines) + "\n"


def tuned(tuning: Mapping[str, Any]) -> str:
    """How step sizes were found, in words; who stands at an edge is named."""
    if taken := tuning.get("taken_from"):
        return f"step sizes are those of {taken}, not tuned again"
    tried = {name: entry for name, entry in tuning["chosen"].items() if entry["tried"]}
    if not tried:
        return "step sizes are those given, not tuned"
    where = "" if tuning["regime"] == "whole" else f"with this store ({tuning['regime']}) "
    edges = [f"{name} ({entry['edge']})" for name, entry in tried.items() if entry["edge"]]
    edge = f"; at an edge all the same: {', '.join(edges)}" if edges else ""
    changed = any(CHANGE in name for name in tuning["chosen"])
    borrowed = ", what changes a method takes that method's" if changed else ""
    return (
        f"step sizes tuned {where}over {tuning['grid']}, and beyond while an edge was best (at most {tuning['most']} "
        f"in all), on order A, on the first {tuning['share']:.0%} of each source, with a seed of its own"
        f"{borrowed}{edge}"
    )


def heading(name: str) -> str:
    """A regime as a heading."""
    share = REGIMES[name]
    return f"Store: {100 * share:g} % of the stream's bytes" if share else "Store: the whole history"


def _table(found: Mapping[str, Any]) -> List[str]:
    measure = measured(found["final_bpb"])
    head = ["method", "final", "95 %", f"lead of {measure} (95 %)", *COLUMNS.values(), "rejected", "stored"]
    rows = ["| " + " | ".join(head) + " |", "| --- " + "| ---: " * (len(head) - 1) + "|"]
    for name in sorted(found["final_bpb"], key=lambda n: found["final_bpb"][n]):
        low, high = found["interval"][name]
        lead = found.get("against", {}).get("final_bpb", {}).get(name)
        rounds, stored = found["rounds"][name], found["stored_bytes"].get(name)
        cells = [
            f"**{name}**" if name == measure else name,
            f"{found['final_bpb'][name]:.3f}",
            f"{low:.3f} .. {high:.3f}",
            f"{lead['mean']:+.3f} ({lead['low']:+.3f} .. {lead['high']:+.3f})" if lead else "",
            *(_cell(found[key].get(name), key) for key in COLUMNS),
            f"{rounds['rejected']} of {sum(rounds.values())}" if sum(rounds.values()) else "",
            f"{stored / 1024:,.0f} KiB" if stored is not None else "",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _cell(value: float | None, key: str) -> str:
    if value is None:
        return ""
    if key.endswith("_steps"):
        return f"{value:.2f}"
    return f"{value:+.3f}" if key in ("forgetting", "gap_bpb") else f"{value:.3f}"
