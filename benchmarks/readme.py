"""The result tables of README.md, from a run and from RESULTS.md.

`python -m benchmarks.readme RUN_DIR` keeps the run's figures in benchmarks/results/default-run.json and writes the
tables; without RUN_DIR it writes them from what is kept; `--check` writes nothing and fails where README.md differs.
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

from benchmarks.results import RESULTS, SUMMARY
from benchmarks.tables import Machine, markdown_table
from nl_model.weights import write_durably
from pipelines.compare.outcome import heading
from pipelines.config.load import flatten, load_config, shipped_configs
from pipelines.report.page import Line, duration, headline, read_summary, source_lines
from pipelines.report.sides import sides

README = Path(__file__).resolve().parents[1] / "README.md"
KEPT = Path(__file__).parent / "results" / "default-run.json"
MODEL = KEPT.with_name("model.json")
COMPARISONS = tuple(KEPT.with_name(f"compare-s5{regime}.json") for regime in ("", "-cap5", "-cap1", "-small"))
ELSEWHERE = {
    "compare-tshift": "Python's PEPs by year, softly mixed",
    "compare-s5-order3": "the same texts, a third order",
    "compare-s5-twice": "the same texts, twice the FLOPs",
    "compare-s5-mixed": "the same texts, mixed with drifting weights",
    "compare-s5-scratch": "the same texts, without a base",
    "compare-installed": "the text of `make run`",
}
"""Comparisons on other streams, by file name, and what they stream."""
PRINCIPAL = ("circadian", "replay_tuned", "replay_50", "naive")
"""Methods shown of them."""
READERS = ("circadian", "replay_balanced", "mer", "replay_50", "replay_tuned", "one_frequency", "naive")
"""Methods whose online loss is shown."""
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
        raise ValueError(f"README.md must have {start} once and below it {end} once; add them where the table belongs")
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


def render_comparison(*outcomes: Mapping[str, Any]) -> str:
    """Markdown: Circadian's lead over every method, by regime, from what `circadian compare --out` wrote.

    Args:
        outcomes: of one stream; the first one's figures order the methods. Methods of a regime may be in several of
            them, held against the same trials of Circadian. ValueError where these differ.
    """
    regimes: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        for name, found in outcome["regimes"].items():
            regimes[name] = _together(regimes[name], found) if name in regimes else found
    finals = [found["mean_final_bpb"] for found in regimes.values()]
    names = list(dict.fromkeys(name for final in finals for name in sorted(final, key=lambda n: final[n])))
    rows = [[f"`{name}`", *(_lead(found, name) for found in regimes.values())] for name in names]
    table = markdown_table(["final bits per byte (Circadian's lead, 95 %)", *map(heading, regimes)], rows)
    made = "\n".join(
        f"* {', '.join(map(heading, o['regimes']))}: {len(o['seeds'])} seeds x {len(o['orders'])} orders. Made by "
        f"`{o['command']}`."
        for o in outcomes
    )
    return (
        f"{table}\n\nMeans at equal FLOPs and one bound on stored text, of the weights alone (recall changes only "
        f"the online loss); learning, forgetting, online loss and plots: benchmarks/results/compare-s5.md and the "
        f"pages beside it.\n{made}"
    )


def _together(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Final means of two comparisons in one regime, and Circadian's lead in each."""
    finals, more = one["mean_final_bpb"], other["mean_final_bpb"]
    for name in finals.keys() & more.keys():
        if finals[name] != more[name]:
            raise ValueError(
                f"{name} ends at {finals[name]} in one comparison and at {more[name]} in another of the same regime; "
                "make both anew with one state of the code"
            )
    leads = {**other["against"]["mean_final_bpb"], **one["against"]["mean_final_bpb"]}
    return {"mean_final_bpb": {**more, **finals}, "against": {"mean_final_bpb": leads}}


def render_elsewhere(*outcomes: Mapping[str, Any]) -> str:
    """Markdown: final bits of the principal methods on other streams, with the whole history.

    Args:
        outcomes: what `circadian compare --out` wrote, to files that `ELSEWHERE` names.
    """
    rows, commands = [], []
    for outcome in outcomes:
        where = ELSEWHERE[Path(outcome["command"].split(" --out ")[1].split()[0]).stem]
        cells = [_lead(outcome["regimes"]["whole"], name) for name in PRINCIPAL]
        rows.append([where, str(len(outcome["seeds"]) * len(outcome["orders"])), *cells])
        commands.append(f"* {where}: `{outcome['command']}`")
    table = markdown_table(["stream", "trials", *(f"`{name}`" for name in PRINCIPAL)], rows)
    return "\n".join([table, "", *commands])


def render_online(*outcomes: Mapping[str, Any]) -> str:
    """Markdown: online loss of Circadian and of who reads best, by the weights alone and together with recall.

    Args:
        outcomes: what `circadian compare --out` wrote with the whole history stored; without readings: left out.
    """
    outcomes = tuple(o for o in outcomes if o["regimes"]["whole"].get("recalled_bpb"))
    names = [name for name in READERS if all(name in o["regimes"]["whole"]["recalled_bpb"] for o in outcomes)]
    head, rows = ["online bits per byte"], [[f"`{name}`"] for name in names]
    for outcome in outcomes:
        streamed, found = outcome["stream"], outcome["regimes"]["whole"]
        stream = "soft shift" if streamed["schedule"] == "soft" else ", ".join(streamed["sources"])
        head += [f"{stream}, weights alone", f"{stream}, with recall"]
        for row, name in zip(rows, names, strict=True):
            row += [_bold(found, name, key) for key in ("weights_bpb", "recalled_bpb")]
    made = "\n".join(f"* `{o['command']}`" for o in outcomes)
    return f"{markdown_table(head, rows)}\n\nBold: as the method reads. Made by\n{made}"


def _bold(found: Mapping[str, Any], name: str, reading: str) -> str:
    """A method's online loss, bold where that is how it reads."""
    text = f"{found[reading][name]:.3f}"
    return f"**{text}**" if found[reading][name] == found["online_bpb"][name] else text


def _lead(found: Mapping[str, Any], name: str) -> str:
    """A method's figure, and how far Circadian is below it."""
    if name not in found["mean_final_bpb"]:
        return ""
    value, lead = found["mean_final_bpb"][name], found.get("against", {}).get("mean_final_bpb", {}).get(name)
    if lead is None:
        return f"**{value:.3f}**"
    interval = "" if lead["high"] == lead["low"] else f", {-lead['high']:+.3f} .. {-lead['low']:+.3f}"
    return f"{value:.3f} ({-lead['mean']:+.3f}{interval})"


BLOCKS: dict[str, tuple[tuple[Path, ...], Callable[..., str]]] = {
    "model": ((MODEL,), render_model),
    "compare": (COMPARISONS, render_comparison),
    "online": ((KEPT.with_name("compare-tshift.json"), KEPT.with_name("compare-s5-read.json")), render_online),
    "elsewhere": (tuple(KEPT.with_name(f"{name}.json") for name in ELSEWHERE), render_elsewhere),
}
"""Tables of README.md that come from kept figures, by marker; left as they are where none of the files is there."""


def filled(readme: str, kept: Mapping[str, Any], results: str, blocks: bool = False) -> str:
    """README.md as text with its tables; `blocks`: those of `BLOCKS` too."""
    text = fill(fill(readme, "results", render_results(kept)), "bench", render_bench(results))
    for name, (paths, render) in BLOCKS.items() if blocks else ():
        if found := [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]:
            text = fill(text, name, render(*found))
    return text


def _read(path: Path, remedy: str) -> str:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; {remedy}")
    return path.read_text(encoding="utf-8")


def difference(readme: Path = README, kept: Path = KEPT, results: Path = RESULTS) -> str:
    """What writing the tables would change in README.md, as a unified diff; empty where it is up to date.

    Raises ValueError where one of the files or a marker is missing.
    """
    text = _read(readme, "write it first")
    figures = json.loads(_read(kept, "make it with: python -m benchmarks.readme RUN_DIR"))
    wanted = filled(text, figures, _read(results, "make it with: make bench"), readme == README)
    before, after = text.splitlines(keepends=True), wanted.splitlines(keepends=True)
    return "".join(difflib.unified_diff(before, after, "README.md", "README.md as it should be"))


def write(run_dir: Path | None, readme: Path = README, kept: Path = KEPT, results: Path = RESULTS) -> None:
    """Keep a run's figures, if one is given, and write README.md's tables.

    Raises ValueError, before anything is written, where one of the files or a marker is missing.
    """
    text = _read(readme, "write it first")
    if run_dir is None:
        figures = json.loads(_read(kept, "make it with: python -m benchmarks.readme RUN_DIR"))
    else:
        figures = keep(run_dir)
    wanted = filled(text, figures, _read(results, "make it with: make bench"), readme == README)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_durably(kept, (json.dumps(figures, indent=1) + "\n").encode())
    write_durably(readme, wanted.encode())


def main() -> None:
    """Entry point: exit status 1 where --check finds a difference, 2 where something is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("run_dir", nargs="?", type=Path, metavar="RUN_DIR", help="a finished run, else the kept one")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where README.md is out of date")
    arguments = parser.parse_args()
    if arguments.check and arguments.run_dir is not None:
        parser.error("--check compares README.md with what is kept; leave RUN_DIR out")
    try:
        if not arguments.check:
            write(arguments.run_dir)
        elif changes := difference():
            print(changes)
            sys.exit(1)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
