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
from nl_model.recall import Recall
from nl_model.weights import load_into
from pipelines.compare.material import Material
from pipelines.compare.meter import Meter
from pipelines.config.schema import Config
from pipelines.gate.probe import Row, read_matrix, score

POINTS = 40
"""Points of the online-loss curve."""
RECALL_SLOTS = 1 << 17
"""Contexts per length that recall holds."""


@dataclass
class Trace:
    """Grows while a trial runs."""

    material: Material
    meter: Meter
    rows: List[Row] = field(default_factory=list)
    recall: Optional[Recall] = None
    """Reads beside the model, if only to say what that is worth. It hears all that is read: where that is stored."""
    reads_with_recall: bool = False
    """Whether the method itself reads so: then its online loss is that, and the index counts as stored."""
    online: List[Tuple[int, float, float, float]] = field(default_factory=list)
    """Per scored batch: stream position in tokens, bits of the weights alone, bits with recall, bytes."""
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

    def saw(self, position: int, tokens_BS: Tensor, logits_BTV: Tensor, nll_BT: Tensor, bytes_B: np.ndarray) -> None:
        """Note the loss of sequences of the stream before learning from them; logits and loss are the model's."""
        alone = nll_BT.detach().double().sum().item()
        recalled = alone
        if self.recall is not None and len(tokens_BS):
            recalled = float(self.recall.read(tokens_BS.cpu().numpy(), logits_BTV, nll_BT).sum())
        if math.isfinite(alone):
            self.online.append((position, alone / math.log(2), recalled / math.log(2), float(bytes_B.sum())))

    def holds(self, size: int) -> None:
        """Note bytes held, without recall's index."""
        index = self.recall.bytes if self.recall is not None and self.reads_with_recall else 0
        self.stored_bytes = max(self.stored_bytes, size + index)

    def result(self) -> Dict[str, Any]:
        """The figures of the trial, JSON-able, all in bits per byte."""
        material = self.material
        figures = read_matrix(self.rows, material.ends, material.sources, material.cfg.model.context)
        final = self.rows[-1].bpb
        alone, recalled, size = (sum(batch[i] for batch in self.online) for i in (1, 2, 3))
        weights_bpb, recalled_bpb = (alone / size, recalled / size) if size else (None, None)
        return {
            "mean_final_bpb": figures["mean_final_bpb"],
            "forgetting": figures["forgetting"],
            "learning": figures["learning"],
            "base_bpb": float(np.mean([final[s] for s in material.base_sources])) if material.base_sources else None,
            "online_bpb": recalled_bpb if self.reads_with_recall else weights_bpb,
            "weights_bpb": weights_bpb,
            "recalled_bpb": recalled_bpb if self.recall is not None else None,
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
        """Online loss along the stream, as the method reads, in `POINTS` equal parts: (tokens, bits per byte)."""
        if not self.online:
            return []
        position, alone, recalled, size = (np.array(column) for column in zip(*self.online, strict=True))
        bits = recalled if self.reads_with_recall else alone
        part = np.minimum(position * POINTS // max(1, self.material.stream_tokens), POINTS - 1).astype(int)
        sums = [np.bincount(part, weights=values, minlength=POINTS) for values in (bits, size)]
        width = self.material.stream_tokens / POINTS
        return [(int((i + 1) * width), float(b / n)) for i, (b, n) in enumerate(zip(*sums, strict=True)) if n]


def fresh_recall(material: Material, capacity: float) -> Optional[Recall]:
    """Recall that has heard the base's text; none where less than everything may be stored: its index is text too."""
    if capacity < float("inf"):
        return None
    recall = Recall(RECALL_SLOTS)
    if material.has_base:
        recall.remember(material.base.tokens_NS)
    return recall


def fresh_model(
    material: Material, weights: Dict[str, Tensor], device: torch.device, cfg: Optional[Config] = None
) -> NestedLM:
    """A model with the base's weights, every parameter trainable. `cfg`: with other periods than the material's."""
    cfg = cfg or material.cfg
    model = NestedLM(cfg.model, cfg.levels, material.vocab_size).to(device)
    load_into(model, weights)
    return model.requires_grad_(True)
