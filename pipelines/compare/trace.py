"""What a trial leaves behind: the matrix of scores, the online loss along the stream, FLOPs and bytes.

Shapes: B sequences, T predicted tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from nl_model.model import NestedLM
from nl_model.weights import load_into
from pipelines.compare.material import Material
from pipelines.compare.meter import Meter
from pipelines.config import Config
from pipelines.probe import Row, read_matrix, score

POINTS = 40
"""Points of the online-loss curve."""


@dataclass
class Trace:
    """Grows while a trial runs."""

    material: Material
    meter: Meter
    rows: List[Row] = field(default_factory=list)
    online: List[Tuple[int, float, float]] = field(default_factory=list)
    """Per scored batch: stream position in tokens, bits, bytes."""
    stored_bytes: int = 0
    """Most bytes held at any time."""
    learner_flops: float = 0.0
    """FLOPs that the learner itself spends on the stream, which sleep elsewhere does not."""
    inline_flops: float = 0.0
    """FLOPs that the next batch waits for, whoever spends them; days of many batches are slept on beside the stream."""
    notes: Dict[str, Any] = field(default_factory=dict)

    def score(self, model: NestedLM, tokens: int) -> Dict[str, float]:
        """Add a row of the matrix."""
        found = score(model, self.material.probes, self.material.sources, self.material.cfg.compute.precision)
        self.rows.append(Row(len(self.rows), tokens, found))
        return found

    def saw(self, position: int, nll_BT: Tensor, bytes_B: np.ndarray) -> None:
        """Note the loss of sequences of the stream before learning from them."""
        nats = nll_BT.detach().double().sum().item()
        if math.isfinite(nats):
            self.online.append((position, nats / math.log(2), float(bytes_B.sum())))

    def holds(self, size: int) -> None:
        """Note bytes held."""
        self.stored_bytes = max(self.stored_bytes, size)

    def result(self) -> Dict[str, Any]:
        """The figures of the trial, JSON-able, all in bits per byte."""
        material = self.material
        figures = read_matrix(self.rows, material.ends, material.sources, material.cfg.model.context)
        final = self.rows[-1].bpb
        bits, size = sum(b for _, b, _ in self.online), sum(n for _, _, n in self.online)
        return {
            "mean_final_bpb": figures["mean_final_bpb"],
            "forgetting": figures["forgetting"],
            "learning": figures["learning"],
            "base_bpb": float(np.mean([final[s] for s in material.base_sources])) if material.base_sources else None,
            "online_bpb": bits / size if size else None,
            "matrix": figures["matrix"],
            "sources": material.sources,
            "positions": [row.tokens for row in self.rows],
            "curve": self.curve(),
            "flops": {**self.meter.spent, "total": self.meter.total},
            "learner_step": self.learner_flops / (self.meter.full * material.stream_tokens),
            "inline_step": self.inline_flops / (self.meter.full * material.stream_tokens),
            "stored_bytes": self.stored_bytes,
            **self.notes,
        }

    def curve(self) -> List[Tuple[int, float]]:
        """Online loss along the stream in `POINTS` equal parts: (position in tokens, bits per byte)."""
        if not self.online:
            return []
        position, bits, size = (np.array(column) for column in zip(*self.online, strict=True))
        part = np.minimum(position * POINTS // max(1, self.material.stream_tokens), POINTS - 1).astype(int)
        sums = [np.bincount(part, weights=values, minlength=POINTS) for values in (bits, size)]
        width = self.material.stream_tokens / POINTS
        return [(int((i + 1) * width), float(b / n)) for i, (b, n) in enumerate(zip(*sums, strict=True)) if n]


def fresh_model(
    material: Material, weights: Dict[str, Tensor], device: torch.device, cfg: Optional[Config] = None
) -> NestedLM:
    """A model with the base's weights, every parameter trainable. `cfg`: with other periods than the material's."""
    cfg = cfg or material.cfg
    model = NestedLM(cfg.model, cfg.levels, material.vocab_size).to(device)
    load_into(model, weights)
    return model.requires_grad_(True)
