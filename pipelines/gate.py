"""The gate: a candidate goes live only if it forgets no more than its budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Dict, Mapping, Sequence

from pipelines.gate_config import GateConfig


@dataclass(frozen=True)
class Decision:
    """What the gate decided, why, and on which figures (bits per byte on held-out probes)."""

    promoted: bool
    reason: str
    figures: Dict[str, Any]

    @property
    def word(self) -> str:
        """promoted or rejected."""
        return "promoted" if self.promoted else "rejected"


def decide(
    candidate: Mapping[str, float],
    anchor: Mapping[str, float],
    awake: Mapping[str, float],
    seen: Sequence[str],
    cfg: GateConfig,
) -> Decision:
    """Judge a candidate on the sources seen so far.

    Args:
        candidate: bits per byte by source of the student at rest.
        anchor: the same of the last promoted release.
        awake: the same of the awake model that the student started from.
        seen: sources of the base and of the stream up to the snapshot.
    """
    change = {source: candidate[source] - anchor[source] for source in seen}
    bad = sorted(source for source in seen if not math.isfinite(candidate[source]))
    worst = max(seen, key=lambda source: change[source] if math.isfinite(change[source]) else math.inf)
    mean_change = sum(change.values()) / len(seen)
    figures: Dict[str, Any] = {
        "candidate": dict(candidate),
        "anchor": dict(anchor),
        "awake": dict(awake),
        "seen": list(seen),
        "worst": {"source": worst, "loss": change[worst]},
        "mean_change": mean_change,
    }
    if bad:
        return Decision(False, f"loss on {', '.join(bad)} is not finite", figures)
    if change[worst] > cfg.max_forgetting:
        reason = (
            f"forgets {worst} by {change[worst]:.3f} bits per byte, more than gate.max_forgetting={cfg.max_forgetting}"
        )
        return Decision(False, reason, figures)
    if mean_change > cfg.max_regression:
        budget = f"gate.max_regression={cfg.max_regression}"
        reason = f"is worse by {mean_change:.3f} bits per byte on average, more than {budget}"
        return Decision(False, reason, figures)
    return Decision(True, f"worst source {worst} {change[worst]:+.3f}, mean {mean_change:+.3f} bits per byte", figures)
