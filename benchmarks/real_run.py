"""What a run reaches: `circadian run` in real processes against the same command with `strategy=replay`.

    python -m benchmarks.real_run --stream ../shared/data/s5 --json benchmarks/results/real-run.json

Every figure is read from the runs' own journals: nothing is computed here but means. The served model (live release and
fast levels as they stand) is looked at twenty times along the stream, on held-out text that no gate, trigger or sampler
sees. Who measures knows how long the stream is; the runs do not. Finished runs are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import command_line, keep_page
from benchmarks.tables import Machine, markdown_table
from nl_model.flops import full_step_flops
from nl_model.weights import write_durably
from pipelines.compare.measure import read_looks
from pipelines.config.load import load_config, to_yaml
from pipelines.config.schema import Config
from pipelines.data.module import open_data
from pipelines.machine.control import gate_flops
from pipelines.report.events import read_events
from pipelines.report.page import read_summary

LOOKS = 20
EPOCHS = 2.0
"""FLOPs of wake, sleep and gate together, in full training steps per streamed token."""


@dataclass(frozen=True)
class Text:
    """What is streamed."""

    stream: str
    """Folder of NAME/train.txt and NAME/valid.txt."""
    sources: str
    """Sources of the stream, in order."""
    base: str
    """Sources of the base."""


TIMEOUT = 3600.0
"""Seconds after which a run is given up."""


@dataclass(frozen=True)
class Look:
    """The served model at a moment."""

    tokens: int
    """Stream position."""
    release: int
    """Release that it had adopted."""
    served: float
    """Mean bits per byte over the sources seen so far."""
    rested: float
    """The same of the release alone."""


@dataclass(frozen=True)
class RunFigures:
    """What one run came to. Bits per byte, lower is better."""

    strategy: str
    """Name of the strategy, with the keys that were changed."""
    seed: int
    final: float
    """Mean over all sources of the served model at the last look."""
    area: float
    """Mean over stream positions of the mean over the sources seen so far (compare/measure.py `read_looks`)."""
    gap: float
    """Most by which the served model is worse than its release, at any look."""
    online: float
    """Every sequence before it is learned from, of the weights alone."""
    recalled: float
    """The same read together with recall; not a number without."""
    epochs: float
    """FLOPs of wake, sleep and gate together, in full training steps per streamed token."""
    rounds: int
    promoted: int
    seconds: float
    """Wall seconds of the stream."""
    finals: Mapping[str, float]
    """Bits per byte by source at the last look."""
    looks: Sequence[Look]


def from_plain(plain: Mapping[str, Any]) -> RunFigures:
    """What `asdict` made of a run's figures, out of a JSON file."""
    recalled = plain["recalled"] if plain["recalled"] is not None else math.nan
    return RunFigures(**{**plain, "recalled": recalled, "looks": [Look(**look) for look in plain["looks"]]})


def config_of(text: Text, strategy: str, seed: int, root: Path, changes: Sequence[str], deterministic: bool) -> Config:
    """The configuration of one run: micro sizes, looked at twenty times."""
    name = f"{strategy}-{seed}" + "".join(f"-{change}" for change in changes).replace("/", "_").replace("=", "-")
    overrides = [
        f"stream.path={text.stream.rstrip('/')}/*/[tv][ra]*.txt",
        f"stream.sources=[{text.sources}]",
        f"base.sources=[{text.base}]",
        f"strategy={strategy}",
        f"run.name={name}",
        f"run.root={root}",
        f"run.seed={seed}",
        f"run.deterministic={str(deterministic).lower()}",
        "control.enabled=false",
        *changes,
    ]
    cfg = load_config("default", [f"sleep.epochs={EPOCHS}", *overrides], "micro")
    data = open_data(cfg)
    tokens = data.stream().estimate_tokens()
    # What the gate reads for depends on how often a strategy has rounds; the rest of the budget is for wake and sleep.
    full = full_step_flops(cfg.model, cfg.levels, data.tokenizer.vocab_size)
    rest = EPOCHS - gate_flops(cfg, data, tokens) / tokens / full
    measured = [f"sleep.epochs={rest:.4f}", f"report.look_every={tokens // LOOKS}"]
    return load_config("default", [*measured, *overrides], "micro")


def run(cfg: Config) -> Path:
    """Run `circadian run`, or go on where an earlier one stopped; returns its directory. RuntimeError where it
    fails."""
    directory = Path(cfg.run.root).resolve() / cfg.run.name
    if (directory / "summary.json").exists():
        return directory
    file = directory.parent / f"{cfg.run.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_durably(file, to_yaml(cfg).encode())
    command = [sys.executable, "-m", "cluster.cli", "run", str(file)]
    log = directory.parent / f"{cfg.run.name}.log"
    with log.open("ab") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=TIMEOUT, check=False).returncode
    if code or not (directory / "summary.json").exists():
        raise RuntimeError(f"{shlex.join(command)} ended with {code}; see {log}")
    return directory


def read_run(directory: Path, cfg: Config, strategy: str) -> RunFigures:
    """The figures of a finished run, from its journal and its summary."""
    summary = read_summary(directory)
    # A step that was replayed after a crash was looked at twice, with the same result.
    seen = {(e["tokens"], e["release"]): e for e in read_events(directory / "events.jsonl") if e["event"] == "look"}
    looks = list(seen.values())
    found = read_looks(looks)
    shape = (cfg.model, cfg.levels, open_data(cfg).tokenizer.vocab_size)
    return RunFigures(
        strategy=strategy,
        seed=cfg.run.seed,
        final=found["final_bpb"],
        area=found["area_bpb"],
        gap=found["gap_bpb"],
        online=summary["online_bpb"],
        recalled=summary["recalled_bpb"] or math.nan,
        epochs=summary["flops"]["total"] / full_step_flops(*shape) / summary["tokens_streamed"],
        rounds=len(summary["rounds"]),
        promoted=sum(record["decision"] == "promoted" for record in summary["rounds"]),
        seconds=summary["seconds"]["stream"],
        finals=looks[-1]["served"],
        looks=[Look(e["tokens"], e["release"], *m[1:]) for e, m in zip(looks, found["looks"], strict=True)],
    )


def table(found: Sequence[RunFigures]) -> str:
    """Means over the seeds, a row per strategy; in brackets the least and the most."""
    rows = []
    for name in dict.fromkeys(one.strategy for one in found):
        mine = [one for one in found if one.strategy == name]

        def spread(key: str, mine: Sequence[RunFigures] = mine) -> str:
            values = [getattr(one, key) for one in mine]
            return f"{statistics.fmean(values):.3f} ({min(values):.3f} .. {max(values):.3f})"

        promoted = f"{sum(one.promoted for one in mine)} of {sum(one.rounds for one in mine)}"
        rows.append(
            [f"`{name}`", *(spread(key) for key in ("final", "area", "gap", "online", "recalled", "epochs")), promoted]
        )
    head = ["strategy", "final", "along the stream", "served - release, worst", "online", "with recall", "FLOPs"]
    return markdown_table([*head, "promoted"], rows)


def page(found: Sequence[RunFigures]) -> str:
    """The page beside the JSON file."""
    seeds = sorted({one.seed for one in found})
    about = (
        "Bits per byte on held-out text, lower is better: means over seeds "
        f"{', '.join(map(str, seeds))}, the least and the most in brackets. *Final*: the served model over "
        f"all sources, at the end. *Along the stream*: mean of {LOOKS} looks at the served model over the sources seen "
        "so far. *FLOPs*: of wake, sleep and gate, in full training steps per streamed token."
    )
    sources = list(found[0].finals)
    rows = [
        [f"`{one.strategy}`", str(one.seed), *(f"{one.finals[source]:.3f}" for source in sources), f"{one.seconds:.0f}"]
        for one in found
    ]
    return f"{about}\n\n{table(found)}\n\n{markdown_table(['strategy', 'seed', *sources, 'seconds'], rows)}"


def main() -> None:
    """Run what is not run yet and write JSON and page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_run", description=__doc__)
    parser.add_argument("--stream", default="../shared/data/s5", help="folder of NAME/train.txt and NAME/valid.txt")
    parser.add_argument("--sources", default="play,code_c,law_de", help="of the stream, in order")
    parser.add_argument("--base", default="wiki,math", help="sources of the base")
    parser.add_argument("--seeds", default="1,2,3")
    given = "circadian,circadian:run.lag=0,replay:levels.slow.period=65536"
    parser.add_argument("--strategies", default=given, help="names; NAME:key=value changes keys")
    parser.add_argument("--work", type=Path, default=Path("runs/real-run"), help="where runs are kept")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/real-run.json"))
    parser.add_argument("--free", action="store_true", help="adopt releases as they come, not at fixed positions")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    text, found = Text(options.stream, options.sources, options.base), []
    for seed in (int(part) for part in options.seeds.split(",")):
        for given in options.strategies.split(","):
            strategy, *changes = given.split(":")
            cfg = config_of(text, strategy, seed, options.work, changes, not options.free)
            found.append(read_run(run(cfg), cfg, given))
            one = found[-1]
            print(
                f"{given} seed {seed}: final {one.final:.3f} area {one.area:.3f} gap {one.gap:+.4f} "
                f"online {one.online:.3f} FLOPs {one.epochs:.3f} ({one.promoted} of {one.rounds} promoted, "
                f"{one.seconds:.0f} s)",
                flush=True,
            )
    plain = {"command": command_line(), "machine": Machine.here().show(), "runs": [asdict(one) for one in found]}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write_durably(options.json, json.dumps(plain, indent=1).encode())
    keep_page(options.json, page(found))
    print(f"\n{table(found)}\n\n{options.json}, {options.json.with_suffix('.md')}")


if __name__ == "__main__":
    main()
