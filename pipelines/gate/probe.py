"""Held-out measurement: bits per byte per source, the matrix R[k][i], and what is read off it.

R[k][i] is the bits per byte on source i of the k-th live model; lower is better.
Shapes: B sequences, T predicted tokens per sequence, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Dict, List, Mapping, Sequence, Tuple

import numpy as np
import torch
from torch.nn import functional as F

from nl_model.model import NestedLM, autocast
from pipelines.data.stream import Probe


@dataclass(frozen=True)
class Score:
    """A model on one probe, sequence by sequence: what paired comparisons are made of."""

    nats: Tuple[float, ...]
    """Negative log-likelihood of each sequence."""
    bytes: Tuple[float, ...]
    """Bytes that each sequence stands for."""

    @property
    def bpb(self) -> float:
        """Bits per byte over all sequences."""
        return sum(self.nats) / math.log(2) / sum(self.bytes)


@torch.no_grad()
def measure(model: NestedLM, probe: Probe, precision: str = "fp32", batch: int = 16) -> Score:
    """Score every sequence of a probe, `batch` at a time."""
    device = next(model.parameters()).device
    nats: List[float] = []
    for start in range(0, len(probe.tokens), batch):
        tokens = torch.from_numpy(probe.tokens[start : start + batch].astype(np.int64)).to(device)
        with autocast(device, precision):
            nats += model.nll(tokens).double().sum(1).tolist()
    return Score(tuple(nats), probe.row_bytes or (probe.bytes / len(nats),) * len(nats))


def probe_bpb(model: NestedLM, probe: Probe, precision: str = "fp32", batch: int = 16) -> float:
    """Bits per byte of a model on one probe."""
    return measure(model, probe, precision, batch).bpb


def score(
    model: NestedLM, probes: Mapping[str, Probe], sources: Sequence[str], precision: str = "fp32"
) -> Dict[str, float]:
    """Bits per byte of a model on the probes of some sources."""
    return {source: probe_bpb(model, probes[source], precision) for source in sources}


@torch.no_grad()
def prompt_divergence(
    model: NestedLM, anchor: NestedLM, probe: Probe, prompts: int, seed: int, precision: str = "fp32"
) -> float:
    """Mean KL(anchor || model) in nats per token over fixed prompts: sequences of a probe, seeded."""
    device = next(model.parameters()).device
    rows = np.random.default_rng(seed).permutation(len(probe.tokens))[:prompts]
    inputs_BT = torch.from_numpy(probe.tokens[np.sort(rows)].astype(np.int64)).to(device)[:, :-1]
    with autocast(device, precision):
        logs_BTV = [F.log_softmax(one(inputs_BT).float(), -1) for one in (model, anchor)]
    return float(F.kl_div(logs_BTV[0], logs_BTV[1], log_target=True, reduction="none").sum(-1).double().mean())


def split_probe(probe: Probe, most: int) -> Tuple[Probe, Probe]:
    """Sequences that reports are made of, and `most` others (half at most), spread evenly, that gates decide on.

    A single sequence serves both.
    """
    rows = len(probe.tokens)
    if rows < 2:
        return probe, probe
    chosen = _spread(rows, min(most, rows // 2))
    return _rows_of(probe, ~chosen), _rows_of(probe, chosen)


def thinned(probe: Probe, most: int) -> Probe:
    """At most so many of a probe's sequences, spread evenly; 0: all."""
    rows = len(probe.tokens)
    if not most or rows <= most:
        return probe
    return _rows_of(probe, _spread(rows, most))


def _spread(rows: int, count: int) -> np.ndarray:
    """Mask (rows,) of `count` of them, spread evenly."""
    chosen = np.zeros(rows, bool)
    chosen[(2 * np.arange(count) + 1) * rows // (2 * count)] = True
    return chosen


def _rows_of(probe: Probe, chosen: np.ndarray) -> Probe:
    sizes = tuple(size for size, is_in in zip(probe.row_bytes, chosen, strict=True) if is_in)
    return Probe(probe.source, probe.tokens[chosen], sum(sizes), sizes)


@dataclass(frozen=True)
class Row:
    """One row of the matrix: a live model and its score on every source."""

    release: int
    """Number of the release (for the control: of the block)."""
    tokens: int
    """Stream position its experience reaches to, in tokens."""
    bpb: Dict[str, float]
    """Bits per byte by source."""


def own_rows(rows: Sequence[Row], ends: Mapping[str, int], sources: Sequence[str], slack: int) -> Dict[str, int]:
    """Index of the first row after each source had been learned.

    Args:
        ends: stream position of the last token of each streamed source; sources without one belong to the base (row 0).
        slack: tokens by which a row may fall short of a source's end and still count.
    """
    last = len(rows) - 1
    return {
        source: next((k for k, row in enumerate(rows) if row.tokens + slack >= ends[source]), last)
        if source in ends
        else 0
        for source in sources
    }


def read_matrix(rows: Sequence[Row], ends: Mapping[str, int], sources: Sequence[str], slack: int) -> Dict[str, object]:
    """The matrix and its figures, all in bits per byte.

    mean_final_bpb: mean of the last row. learning: mean over streamed sources of the row in which each had just been
    learned. forgetting: mean over sources learned before the last row of how much worse the last row is.
    backward_transfer: its negative (Lopez-Paz & Ranzato, 2017, with the sign of a loss turned).
    """
    own = own_rows(rows, ends, sources, slack)
    final = rows[-1].bpb
    streamed = [s for s in sources if s in ends]
    earlier = [s for s in sources if own[s] < len(rows) - 1]
    forgetting = _mean([final[s] - rows[own[s]].bpb[s] for s in earlier])
    return {
        "matrix": [[row.bpb[s] for s in sources] for row in rows],
        "rows": [{"release": row.release, "tokens": row.tokens, "label": _label(k, row)} for k, row in enumerate(rows)],
        "mean_final_bpb": _mean([final[s] for s in sources]),
        "forgetting": forgetting,
        "backward_transfer": -forgetting,
        "learning": _mean([rows[own[s]].bpb[s] for s in streamed]),
    }


def _label(index: int, row: Row) -> str:
    return "base" if index == 0 else f"{row.tokens / 1000:.0f}k"


def _mean(values: List[float]) -> float:
    return float(np.mean(values)) if values else 0.0
