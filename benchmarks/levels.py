"""Five levels against one, two and three, at equal parameters and equal FLOPs. `python -m benchmarks.levels`.

All start from one base (only the slow level, pretrained on the base sources). Then the stream is read once, and only
the fast levels are written: the same hidden units in all, split over 1, 2, 3 or 5 levels whose periods lie between
2,048 and 32,768 tokens. Every count gets the same tuning: each step size of the grid, all seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Dict, List, Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.results import command_line, keep_page
from benchmarks.tables import Machine, Spread, markdown_table
from nl_model.config import LevelConfig, OptimizerConfig
from nl_model.model import NestedLM
from nl_model.online import OnlineLevels
from pipelines.config.load import load_config
from pipelines.config.schema import Config
from pipelines.data.module import DataModule, open_data
from pipelines.gate.probe import score
from pipelines.machine.local import LocalHost
from pipelines.machine.local import pretrain as pretrain_base
from pipelines.sleep.base import base_sequences

HIDDEN = 480
"""Hidden units of all fast levels of a block together; divisible by every count of levels."""
PERIODS = {1: (2048,), 2: (2048, 32768), 3: (2048, 8192, 32768), 5: (2048, 4096, 8192, 16384, 32768)}
RATES = (1e-3, 3e-3)
PICTURE = "levels.png"
OVERRIDES = ("stream.max_source_bytes=65536", "base.tokens=262144")


@dataclass(frozen=True)
class Outcome:
    """One run: what it was and what came out, in bits per byte."""

    levels: int
    lr: float
    seed: int
    online: float
    """Mean online loss over the stream, before learning from each token."""
    final: float
    """Mean over all probed sources after the stream."""
    base: float
    """Mean over the base's sources after the stream; what was forgotten shows here."""
    written_share: float
    """Share of the fast parameters rewritten per step."""


def level_configs(count: int, lr: float, cfg: Config) -> Dict[str, LevelConfig]:
    """`count` fast levels of HIDDEN units together in the last quarter, and the slow one of the configuration."""
    slow = next(level for level in cfg.levels.values() if level.owner == "pool")
    optimizer = OptimizerConfig(lr=lr)
    fast = {
        f"every_{period}": LevelConfig(period=period, width=HIDDEN // count, optimizer=optimizer)
        for period in PERIODS[count]
    }
    return {**fast, "slow": replace(slow, period=max(PERIODS[count]) * 64)}


def pretrain(cfg: Config, setting: DataModule) -> Dict[str, Tensor]:
    """Weights of the slow level, pretrained on the base sources as a run pretrains its base."""
    cfg = replace(cfg, levels=level_configs(1, 0.0, cfg))
    with tempfile.TemporaryDirectory() as folder:
        host = LocalHost(cfg, setting, Path(folder))
        fast = set(host.build_model().owned_by("learner"))
        sequences = base_sequences(setting.corpus, setting.tokenizer, cfg, setting.base_sources)
        return {name: tensor for name, tensor in pretrain_base(cfg, host, sequences).items() if name not in fast}


def live_through(cfg: Config, setting: DataModule, base: Dict[str, Tensor], count: int, lr: float) -> Outcome:
    """Read the whole stream once with `count` fast levels."""
    levels = level_configs(count, lr, cfg)
    model = NestedLM(cfg.model, levels, setting.tokenizer.vocab_size).reset_parameters(cfg.run.seed)
    model.load_state_dict({**model.state_dict(), **base})
    online = OnlineLevels(model, [n for n, level in levels.items() if level.owner == "learner"])
    stream, nats, bytes_ = setting.stream(), 0.0, 0
    sizes = {name: size for name, size in model.level_sizes().items() if name in online.names}
    while batch := stream.next_batch(cfg.wake.batch):
        tokens_BS = torch.from_numpy(np.stack([s.tokens for s in batch]).astype(np.int64))
        nats += float(online.learn(tokens_BS).double().sum())
        bytes_ += sum(s.bytes for s in batch)
    model.requires_grad_(False)
    scores = score(model, setting.probes(), setting.sources)
    return Outcome(
        levels=count,
        lr=lr,
        seed=cfg.run.seed,
        online=nats / np.log(2) / bytes_,
        final=float(np.mean([scores[s] for s in setting.sources])),
        base=float(np.mean([scores[s] for s in setting.base_sources])),
        written_share=sum(size / levels[n].period for n, size in sizes.items())
        / sum(sizes.values())
        * cfg.wake.batch
        * cfg.model.context,
    )


def measure(
    seeds: Sequence[int], rates: Sequence[float] = RATES, overrides: Sequence[str] = OVERRIDES
) -> List[Outcome]:
    """All counts, step sizes and seeds, counts interleaved."""
    outcomes = []
    for seed in seeds:
        cfg = load_config("default", [*overrides, f"run.seed={seed}"])
        setting = open_data(cfg)
        base = pretrain(cfg, setting)
        for lr, count in itertools.product(rates, PERIODS):
            outcomes.append(live_through(cfg, setting, base, count, lr))
    return outcomes


def best(outcomes: Sequence[Outcome]) -> Dict[int, List[Outcome]]:
    """For every count the runs of the step size with the lowest mean online loss."""
    chosen = {}
    for count in PERIODS:
        by_rate: Dict[float, List[Outcome]] = {}
        for outcome in outcomes:
            if outcome.levels == count:
                by_rate.setdefault(outcome.lr, []).append(outcome)
        chosen[count] = min(by_rate.values(), key=lambda runs: float(np.mean([run.online for run in runs])))
    return chosen


def render(outcomes: Sequence[Outcome]) -> str:
    """Markdown: median (least .. most) over seeds."""
    header = [
        "fast levels",
        "periods (tokens)",
        "lr",
        "written per step",
        "online bpb",
        "final bpb",
        "base's sources bpb",
    ]
    rows = []
    for count, runs in best(outcomes).items():
        spreads = [Spread.of(getattr(run, key) for run in runs).show(".3f") for key in ("online", "final", "base")]
        periods = ", ".join(f"{period:,}" for period in PERIODS[count])
        rows.append([str(count), periods, f"{runs[0].lr:g}", f"{runs[0].written_share:.0%}", *spreads])
    return markdown_table(header, rows)


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Online and final loss over the number of levels, every seed a dot."""
    import matplotlib  # noqa: PLC0415 (loads slowly)

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3), constrained_layout=True)
    titles = {
        "online": "online loss",
        "final": "after the stream, all sources",
        "base": "after the stream, base's sources",
    }
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for place, runs in enumerate(best(outcomes).values()):
            values = [getattr(run, key) for run in runs]
            axis.plot([place] * len(values), values, "o", color="tab:blue", alpha=0.5)
            axis.plot([place - 0.2, place + 0.2], [np.median(values)] * 2, color="tab:blue")
        axis.set(title=title, xticks=range(len(PERIODS)), xticklabels=list(PERIODS), xlabel="fast levels")
    axes[0].set_ylabel("bits per byte")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Measure, print the table, and write JSON and plot where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for the figures; the plot is laid beside it as PNG")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    outcomes = measure(range(arguments.seeds))
    print(render(outcomes))
    print(f"{time.perf_counter() - start:.0f} s on {Machine.here().show()}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        payload: Dict[str, object] = {"command": command_line(), "machine": asdict(Machine.here())}
        payload["outcomes"] = [asdict(outcome) for outcome in outcomes]
        arguments.json.write_text(json.dumps(payload, indent=1) + "\n")
        draw(outcomes, arguments.json.with_suffix(".png"))
        keep_page(arguments.json, f"{render(outcomes)}\n\n![three losses]({PICTURE})")


if __name__ == "__main__":
    main()
