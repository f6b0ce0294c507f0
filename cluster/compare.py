"""`circadian compare`: options from the command line, progress on the terminal, outcome on disk."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from rich.console import Console

from nl_model.weights import write_durably
from pipelines.compare.figures import write_figures
from pipelines.compare.options import Options
from pipelines.compare.outcome import build_outcome
from pipelines.compare.page import page
from pipelines.compare.runner import Chosen, Comparison, Load, read_chosen


def numbers(given: str, key: str) -> Tuple[float, ...]:
    """A comma-separated list of numbers; ValueError names the option."""
    try:
        return tuple(float(part) for part in given.split(",") if part)
    except ValueError:
        raise ValueError(f"{key} {given!r} is no comma-separated list of numbers, such as 0,1,2") from None


def command_line() -> str:
    """The command that this process was started with, as it would be typed."""
    return shlex.join(["circadian", *sys.argv[1:]])


def chosen_before(path: Path) -> Dict[str, Chosen]:
    """Step sizes out of an earlier outcome; ValueError where the file is none."""
    try:
        return read_chosen(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--settings {path}: no outcome of `circadian compare` ({error!r})") from None


def compare(
    load: Load, options: Options, work: Path, out: Path, console: Console, settings: Optional[Path] = None
) -> None:
    """Run what is not done yet, then write `out` (JSON), its page (.md) and its pictures (.png) beside it.

    Args:
        load: the configuration with overrides laid over it.
        settings: an earlier outcome; methods that it has tuned keep their step size. ValueError where it is none.
    """
    import torch  # noqa: PLC0415 (seconds that a wrong option should not cost)

    start = time.monotonic()
    frozen = chosen_before(settings) if settings else {}

    def report(what: str, done: int, planned: int, result: Dict[str, Any]) -> None:
        area = f" area {result['area_bpb']:.3f} gap {result['gap_bpb']:+.3f}" if "area_bpb" in result else ""
        steps = f"{result['steps_per_token']['total']:.2f} steps per token"
        text = f"final {result['final_bpb']:.3f}{area}, {steps} ({result['seconds']:.0f} s)"
        console.print(f"{done:4d}/{planned} {what}: {text}", highlight=False, markup=False, soft_wrap=True)

    comparison = Comparison(load, options, work, report, frozen)
    cfg = comparison.cfg
    torch.set_num_threads(cfg.compute.threads)
    chosen, results = comparison.run()
    outcome = build_outcome(options, chosen, results, command_line())
    outcome["tuning"]["taken_from"] = settings.name if settings else None
    outcome["model"] = {"parameters": comparison.parameters(), "context": cfg.model.context, "dim": cfg.model.dim}
    outcome["stream"] = {"sources": cfg.stream.sources, "base": cfg.base.sources, "schedule": cfg.stream.schedule}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_durably(out, json.dumps(outcome, indent=1).encode())
    text = page(outcome)
    write_durably(out.with_suffix(".md"), text.encode())
    pictures: List[Path] = write_figures(outcome, out)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{out}, {out.with_suffix('.md')}, {len(pictures)} pictures; {time.monotonic() - start:.0f} s")
