"""The gate's figures for the report: one row per round, texts ready to show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

NOTHING = "\N{EN DASH}"
KEYS = ("id", "failed", "recent", "awake", "worst", "divergence", "plan")


def gate_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Round, failed check, change on the recent sources against anchor and awake model, worst source, each with its
    interval in bits per byte, divergence in nats per token, and how the plan was changed. Rounds without figures of
    checks are left out."""
    rows = []
    for item in summary.get("rounds") or ():
        checks = (item.get("figures") or {}).get("checks")
        if not checks:
            continue
        found = {check["name"]: check["figures"] for check in checks}
        loss, worst = found.get("loss", {}), found.get("forgetting", {}).get("worst", {})
        failed = next((check["name"] for check in checks if not check["passed"]), NOTHING)
        divergence = found.get("divergence", {}).get("mean")
        texts = (
            str(item["id"]),
            failed,
            _interval(loss.get("recent_change")),
            _interval(loss.get("recent_change_awake")),
            f"{worst['source']} {_interval(worst)}" if worst else NOTHING,
            NOTHING if divergence is None else f"{divergence:.3f}",
            _plan(item),
        )
        rows.append(dict(zip(KEYS, texts, strict=True)))
    return rows


def awake_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """What the gate measured of every round: the release that it started from, the awake model of its mark and the
    candidate, each as a mean over the round's recent sources, in bits per byte. Rounds without these are left out."""
    rows = []
    for item in summary.get("rounds") or ():
        figures = item.get("figures") or {}
        found = [figures.get(side) or {} for side in ("anchor", "awake", "candidate")]
        known = [name for name in found[0] if all(scores.get(name) is not None for scores in found)]
        recent = [name for name in figures.get("recent") or known if name in known]
        if not recent:
            continue
        anchor, awake, candidate = (sum(float(scores[name]) for name in recent) / len(recent) for scores in found)
        texts = {"anchor": f"{anchor:.3f}", "awake": f"{awake:.3f}", "candidate": f"{candidate:.3f}"}
        rows.append({"id": str(item["id"]), **texts, "change": f"{awake - anchor:+.3f}"})
    return rows


def _interval(figures: Optional[Mapping[str, Any]]) -> str:
    if not figures or figures.get("mean") is None:
        return NOTHING
    return f"{figures['mean']:+.3f} ({figures['low']:+.3f} .. {figures['high']:+.3f})"


def _plan(item: Mapping[str, Any]) -> str:
    recent, step = (float(item.get(key) or 1.0) for key in ("recent_scale", "lr_scale"))
    return "as configured" if recent == step == 1.0 else f"recent x {recent:g}, step size x {step:g}"
