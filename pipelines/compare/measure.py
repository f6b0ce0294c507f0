"""What a trial found, read off a simulated run: its looks, its matrix, its journal. Figures in bits per byte."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import numpy as np

from pipelines.gate.probe import Row, read_matrix
from pipelines.machine.records import RoundRecord
from pipelines.machine.state import RunState

POINTS = 64
"""Points of the curve of the online loss."""


@dataclass
class Journal:
    """Takes a run's journal, and keeps what a comparison reads."""

    looks: List[Dict[str, Any]] = field(default_factory=list)
    steps: List[Dict[str, Any]] = field(default_factory=list)

    def note(self, kind: str, fields: Dict[str, Any]) -> None:
        """One line."""
        if kind == "look":
            self.looks.append(fields)
        elif kind == "wake":
            self.steps += fields["steps"]


def read_looks(looks: Sequence[Mapping[str, Any]]) -> Dict[str, Any]:
    """Figures of the served model along the stream.

    final: at the last look. worst: its worst source. area: mean over stream positions of the mean over the sources seen
    there, each position at its first look (what is adopted behind the stream's end comes too late for it). gap: the
    most by which what is served was worse than the release alone, on that mean.
    """
    means = [(look["tokens"], _mean(look["served"]), _mean(look["rested"])) for look in looks]
    first: Dict[int, float] = {}
    for tokens, served, _ in means:
        first.setdefault(tokens, served)
    return {
        "final_bpb": means[-1][1],
        "worst_bpb": max(looks[-1]["served"].values()),
        "area_bpb": float(np.mean(list(first.values()))),
        "gap_bpb": max(served - rested for _, served, rested in means),
        "looks": [list(point) for point in means],
    }


def read_online(steps: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Loss before learning over the whole stream, by bytes; `key`: bpb (weights alone) or recalled (with recall)."""
    bits, sizes = np.array([_bits(step, key) for step in steps]).T
    return float(bits.sum() / sizes.sum()) if sizes.sum() else None


def curve(steps: Sequence[Mapping[str, Any]]) -> List[Tuple[int, float]]:
    """The same along the stream: (tokens, bits per byte since the last point)."""
    parts = np.array_split(np.arange(len(steps)), min(POINTS, len(steps)))
    found = []
    for part in parts:
        bits, sizes = np.array([_bits(steps[i], "bpb") for i in part]).sum(0)
        found.append((int(steps[part[-1]]["tokens"]), float(bits / max(sizes, 1.0))))
    return found


def _bits(step: Mapping[str, Any], key: str) -> Tuple[float, float]:
    sizes = {source: step["bytes"][source] for source in step[key]}
    return sum(step[key][source] * size for source, size in sizes.items()), float(sum(sizes.values()))


def read_rows(state: RunState, sources: Sequence[str], slack: int) -> Dict[str, Any]:
    """The matrix of the releases and what is read off it: learning, forgetting, the last release's mean.

    Rows are made of the text that no gate sees.
    """
    base = state.rows[0]
    rows = [Row(0, 0, base["bpb"])]
    rows += [Row(record.release, record.tokens, record.row) for record in state.rounds if record.release is not None]
    found: Dict[str, Any] = read_matrix(rows, state.ends, sources, slack)
    found["released_bpb"] = found.pop("mean_final_bpb")
    return found


def read_rounds(rounds: Sequence[RoundRecord]) -> Dict[str, int]:
    """Rounds by their decision."""
    promoted = sum(record.promoted for record in rounds)
    return {"promoted": promoted, "rejected": len(rounds) - promoted}


def _mean(values: Mapping[str, float]) -> float:
    return float(np.mean(list(values.values())))
