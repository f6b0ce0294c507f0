"""The result tables of README.md and docs/MODEL.md, from runs and from RESULTS.md.

`python -m benchmarks.readme RUN_DIR` keeps the run's figures in benchmarks/results/default-run.json and writes the
tables; without RUN_DIR it writes them from what is kept; `--check` writes nothing and fails where a page differs.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import real_run
from benchmarks.results import RESULTS, SUMMARY
from benchmarks.tables import Machine, markdown_table
from nl_model.weights import write_durably
from pipelines.config.load import flatten, load_config, shipped_configs
from pipelines.report.page import Line, headline, read_summary, source_lines
from pipelines.report.sides import sides
from pipelines.report.words import duration

README = Path(__file__).resolve().parents[1] / "README.md"
MODEL_PAGE = README.parent / "docs" / "MODEL.md"
KEPT = Path(__file__).parent / "results" / "default-run.json"
MODEL = KEPT.with_name("model.json")
REAL = KEPT.with_name("real-run.json")
LEFT_OUT = ("stream_cursor", "quarantined")
"""Keys of summary.json that are long, or name files of the machine the run was made on."""
PHASES = ("base", "stream", "control")


def keep(run_dir: Path) -> dict[str, Any]:
    """A finished run as it is kept: its summary, and under "made" the command, the day (UTC) and this machine.

    Call it on the machine that made the run. Raises ValueError where summary.json or config.yaml is missing.
    """
    found = read_summary(run_dir)
    day = datetime.fromtimestamp((run_dir / "summary.json").stat().st_mtime, UTC).strftime("%Y-%m-%d")
    made = {"command": command_of(run_dir), "date": day, "machine": asdict(Machine.here())}
    return {**{key: value for key, value in found.items() if key not in LEFT_OUT}, "made": made}


def command_of(run_dir: Path) -> str:
    """The `circadian run` that makes a run of the same configuration: the nearest shipped one and what differs from it.

    Raises ValueError where config.yaml is missing, and where the run has other levels than every shipped configuration.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the directory of a run")
    ran = load_config(str(path))
    commands: list[str] = []
    for name in shipped_configs():
        shipped = load_config(name)
        if set(shipped.levels) == set(ran.levels):
            before, after = flatten(asdict(shipped)), flatten(asdict(ran))
            changed = [key for key, value in after.items() if key != "run.root" and before[key] != value]
            commands.append(" ".join(["circadian run", name, *(f"{key}={_word(after[key])}" for key in changed)]))
    if not commands:
        raise ValueError(f"{path} has levels {', '.join(ran.levels)}, unlike every shipped configuration; use one")
    return min(commands, key=len)


def _word(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"[{','.join(str(item) for item in value)}]" if isinstance(value, list) else str(value)


def render_results(kept: Mapping[str, Any]) -> str:
    """Markdown: a run's table, Circadian against its controls, and what else is to be known of it.

    Args:
        kept: what `keep` returned.
    """
    rows = [_row(line.label, line) for line in headline(kept)]
    base = set(kept["base_sources"])
    for line in source_lines(kept):
        rows.append(_row(f"final, `{line.label}`{' (base)' if line.label in base else ''}", line))
    table = markdown_table(["", *(name for name, _ in sides(kept))], rows)
    return f"{table}\n\n{_facts(kept)}"


def _row(label: str, line: Line) -> list[str]:
    return [label, *(f"**{text}**" if i == line.best else text for i, text in enumerate(line.cells))]


def _facts(kept: Mapping[str, Any]) -> str:
    promoted = sum(item["decision"] == "promoted" for item in kept["rounds"])
    counted, made, machine = kept["experiences"], kept["made"], Machine(**kept["made"]["machine"])
    times = ", ".join(f"{phase} {duration(kept['seconds'][phase])}" for phase in PHASES if phase in kept["seconds"])
    facts = [
        f"{kept['tokens_streamed']:,} tokens streamed, each once; {counted['committed']:,} experiences committed, "
        f"{counted['lost']:,} lost, {counted['duplicates']:,} twice.",
        f"{len(kept['rounds'])} consolidation rounds, {promoted} promoted.",
        *_online(kept),
        f"System overhead {kept['system_overhead']:.1%} of the learner's time; "
        f"{kept['wake_tokens_per_second']:,.0f} tokens/s inside wake steps.",
        f"Wall time: {times}.",
    ]
    facts += [_control(name, figures) for name, figures in sides(kept)[1:] if figures]
    facts.append(f"Machine: {machine.show()}; {made['date']}.")
    facts.append(f"Made by `{made['command']}`, then `python -m benchmarks.readme runs/{kept['run']}`.")
    return "\n".join(f"* {fact}" for fact in facts)


def _control(name: str, figures: Mapping[str, Any]) -> str:
    """A control's step size, and whether it is an optimum."""
    tried, best = figures["tried"], f"{figures['learning_rate']:g}"
    among = f", the best of {len(tried)} by its own final mean" if len(tried) > 1 else ""
    edge = " (at the edge of what was tried)" if figures.get("edge") else ""
    label = "Control" if name == "control" else f"Control `{name}`"
    return f"{label}: the same base and order, step size {best}{among}{edge}."


def _online(kept: Mapping[str, Any]) -> list[str]:
    """Online loss, where the run has kept it."""
    if kept.get("online_bpb") is None:
        return []
    recalled = f", {kept['recalled_bpb']:.3f} read together with recall" if kept.get("recalled_bpb") is not None else ""
    return [f"Online, every sequence before it is learned from: {kept['online_bpb']:.3f} bits per byte{recalled}."]


def render_bench(results: str) -> str:
    """Markdown: the summary of RESULTS.md, given as text. Raises ValueError where it has none."""
    _, found, rest = results.partition(f"{SUMMARY}\n")
    lines = rest.partition("\n## ")[0].strip()
    if not found or not lines:
        raise ValueError(f"RESULTS.md has no section {SUMMARY!r}; write it anew with: make bench")
    return lines


def fill(text: str, name: str, body: str) -> str:
    """A text with `body` between its `name` markers. ValueError unless they are there exactly once, in order."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, opened, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not opened or not closed or text.count(start) > 1 or text.count(end) > 1:
        raise ValueError(f"the page must have {start} once and below it {end} once; add them where the table belongs")
    return f"{before}{start}\n{body}\n{end}{after}"


def render_model(figures: Mapping[str, Any]) -> str:
    """Markdown: speed of the model's ways of learning, from what `python -m benchmarks.model --json` wrote."""
    required = figures["required"]
    rows = []
    for name, ratio in figures["ratios"].items():
        sign = "at most" if name == "wake_peak_memory" else "at least"
        rows.append([f"`{name}`", f"{ratio:.2f}", f"{sign} {required[name]:g}" if name in required else ""])
    table = markdown_table(["tokens per CPU-second by a plain transformer's, trained in full", "ratio", "meant"], rows)
    return (
        f"{table}\n\nThe transformer has as many parameters as our models; other packages' have theirs. Spread and "
        "sizes: benchmarks/results/model.md. Made by `python -m benchmarks.model --peers --json "
        "benchmarks/results/model.json`."
    )


def render_real(outcome: Mapping[str, Any]) -> str:
    """Markdown: what runs of several strategies came to, from what `python -m benchmarks.real_run --json` wrote."""
    found = [real_run.from_plain(one) for one in outcome["runs"]]
    seeds = sorted({one.seed for one in found})
    return (
        f"{real_run.table(found)}\n\nBits per byte on held-out text, lower is better; means over seeds "
        f"{', '.join(map(str, seeds))}, the least and the most in brackets. What the columns are: "
        f"benchmarks/results/real-run.md. Made by `{outcome['command']}` on {outcome['machine']}."
    )


BLOCKS: dict[Path, tuple[str, Path, Callable[..., str]]] = {
    MODEL_PAGE: ("model", MODEL, render_model),
    README: ("real", REAL, render_real),
}
"""By page: the marker of its table that comes from kept figures, and how it is made of them."""


def filled(page: Path, text: str, kept: Mapping[str, Any], results: str) -> str:
    """The text of a page with its tables: those of the main job on every page but MODEL_PAGE, that of `BLOCKS`."""
    if page != MODEL_PAGE:
        text = fill(fill(text, "results", render_results(kept)), "bench", render_bench(results))
    if page in BLOCKS:
        name, path, render = BLOCKS[page]
        text = fill(text, name, render(json.loads(_read(path, "see docs/LOG.md for the command that makes it"))))
    return text


def _read(path: Path, remedy: str) -> str:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; {remedy}")
    return path.read_text(encoding="utf-8")


def difference(page: Path = README, kept: Path = KEPT, results: Path = RESULTS) -> str:
    """What writing the tables would change in a page, as a unified diff; empty where it is up to date.

    Raises ValueError where one of the files or a marker is missing.
    """
    text = _read(page, "write it first")
    figures = json.loads(_read(kept, "make it with: python -m benchmarks.readme RUN_DIR"))
    wanted = filled(page, text, figures, _read(results, "make it with: make bench"))
    before, after = text.splitlines(keepends=True), wanted.splitlines(keepends=True)
    return "".join(difflib.unified_diff(before, after, page.name, f"{page.name} as it should be"))


def write(run_dir: Path | None, page: Path = README, kept: Path = KEPT, results: Path = RESULTS) -> None:
    """Keep a run's figures, if one is given, and write a page's tables.

    Raises ValueError, before anything is written, where one of the files or a marker is missing.
    """
    text = _read(page, "write it first")
    if run_dir is None:
        figures = json.loads(_read(kept, "make it with: python -m benchmarks.readme RUN_DIR"))
    else:
        figures = keep(run_dir)
    wanted = filled(page, text, figures, _read(results, "make it with: make bench"))
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_durably(kept, (json.dumps(figures, indent=1) + "\n").encode())
    write_durably(page, wanted.encode())


def main() -> None:
    """Entry point: exit status 1 where --check finds a difference, 2 where something is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("run_dir", nargs="?", type=Path, metavar="RUN_DIR", help="a finished run, else the kept one")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is out of date")
    arguments = parser.parse_args()
    if arguments.check and arguments.run_dir is not None:
        parser.error("--check compares pages with what is kept; leave RUN_DIR out")
    try:
        if not arguments.check:
            write(arguments.run_dir)
            write(None, MODEL_PAGE)
        elif changes := difference() + difference(MODEL_PAGE):
            print(changes)
            sys.exit(1)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
