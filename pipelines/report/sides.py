"""The sides of a comparison: a run, and the controls that it is held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def sides(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What is compared: the run, then its controls, each with its name and its figures. Without controls one stands
    there empty, so that a table shows what is missing, unless the run has yet to end (`unfinished`). Runs of older
    versions have one control without a strategy."""
    strategy = summary.get("strategy") or "circadian"
    run = ("Circadian" if strategy == "circadian" else f"this run ({strategy})", summary)
    missing = {} if summary.get("unfinished") else {"control": summary.get("control") or {}}
    controls = summary.get("controls") or missing
    return [run, *controls.items()]
