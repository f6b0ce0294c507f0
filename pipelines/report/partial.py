"""The summary of a run that has not ended: what journal and state know so far, and nothing else.

What only the end of a run says (forgetting, learning, backward transfer, what the store holds) is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.machine.state import RunState, Trial
from pipelines.report.events import Event, read_events
from pipelines.report.status import Status, read_state, read_status


def is_unfinished(run_dir: Path) -> bool:
    """Whether a run has yet to write its summary, for the first time or anew. ValueError where it is no run."""
    found = read_status(run_dir)
    return found.phase != "finished" or not (run_dir / "summary.json").is_file()


def partial_summary(run_dir: Path) -> dict[str, Any]:
    """What is known so far, in the keys of summary.json; `unfinished` says where the run is. ValueError where it is no
    run."""
    found, plain = read_status(run_dir), read_state(run_dir)
    journal = run_dir / "events.jsonl"
    events = list(read_events(journal)) if journal.exists() else []
    state = RunState.from_json(plain) if plain else RunState()
    told = _told(events)
    sources = list(told.get("sources") or (state.rows[-1]["bpb"] if state.rows else ()))
    return {"unfinished": _where(found), "run": found.run, **told, "sources": sources, **_decided(state, sources)}


def _where(found: Status) -> str:
    how = "under way" if found.state == "running" else found.state
    if not found.stream_tokens:
        return how
    return f"{how}, phase {found.phase}, {found.tokens:,} of about {found.stream_tokens:,} tokens"


def _told(events: Sequence[Event]) -> dict[str, Any]:
    """What the start of the run said of it."""
    begun = next((event for event in reversed(events) if event["event"] == "run_started"), {})
    keys = ("strategy", "sources", "base_sources")
    return {key: begun[key] for key in keys if begun.get(key)}


def _decided(state: RunState, sources: Sequence[str]) -> dict[str, Any]:
    """What the state knows, as far as it is anything yet."""
    found: dict[str, Any] = {"rounds": [record.to_json() for record in state.rounds]}
    if state.rows:
        found |= _matrix(state.rows, sources)
    if state.tokens:
        found["tokens_streamed"] = state.tokens
    if state.wake["inside"] > 0:
        found["wake_tokens_per_second"] = state.wake["tokens"] / state.wake["inside"]
    spent = {key: value for key, value in state.flops.items() if value}
    if spent:
        found["flops"] = {**spent, "total": state.flops["wake"] + state.flops["sleep"]}
    if state.seconds:
        found["seconds"] = dict(state.seconds)
    if state.control:
        found["controls"] = _controls(state.control, sources)
    return found


def _matrix(rows: Sequence[Mapping[str, Any]], sources: Sequence[str]) -> dict[str, Any]:
    """Rows so far, and the mean of the last."""
    table = [[row["bpb"].get(source) for source in sources] for row in rows]
    known = [value for value in table[-1] if value is not None]
    labels = ["base", *(f"{row['tokens'] / 1000:.0f}k" for row in rows[1:])]
    return {
        "matrix": table,
        "rows": [
            {"release": row["release"], "tokens": row["tokens"], "label": label}
            for row, label in zip(rows, labels, strict=True)
        ],
        **({"mean_final_bpb": sum(known) / len(known)} if known else {}),
    }


def _controls(control: Mapping[str, Mapping[str, Any]], sources: Sequence[str]) -> dict[str, Any]:
    """Of every strategy the trial that ends lowest among those that have ended."""
    best: dict[str, Any] = {}
    for name, ended in sorted((Trial.of(name), ended) for name, ended in control.items()):
        side = {**_matrix(ended["rows"], sources), "flops": ended["flops"], "learning_rate": name.learning_rate}
        mean = side.get("mean_final_bpb")
        if mean is not None and mean < best.get(name.strategy, {}).get("mean_final_bpb", float("inf")):
            best[name.strategy] = side
    return best
