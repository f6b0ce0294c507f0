"""What a night moves from fast levels into slow ones. `python -m benchmarks.transfer --data DIR [--seeds N]`.

A base reads a new source awake, which writes the fast levels alone. The student is the base again, its fast levels at
rest; it sleeps on the same text and on the base's own. Kept: its gain on the new source by that of the awake model.
DIR holds NAME/train.txt and NAME/valid.txt. Shapes: N sequences, B batch, S stored tokens (context + 1).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np
import torch

from benchmarks.interleave import one_thread
from benchmarks.results import keep_page
from benchmarks.tables import Machine, Spread, markdown_table
from nl_model.model import NestedLM
from nl_model.online import OnlineLevels
from nl_model.optim.levelwise import build_optimizer
from nl_model.weights import write_durably
from pipelines.compare.material import Material, Segment, load_material, stream_of_folder
from pipelines.compare.pulls import frozen_copy
from pipelines.compare.trace import fresh_model
from pipelines.compare.trial import Workshop
from pipelines.config.load import load_config
from pipelines.gate.probe import score
from pipelines.sleep.losses import guide_logits, sleep_loss
from pipelines.sleep.schedule import learning_rate

LEAST_KEPT, MOST_LOST = 0.8, 0.02
"""Share of the awake model's gain that the student keeps, at least; bits that another source loses, at most."""
LR, PASSES = 4e-3, 2.0
"""Peak step size asleep; passes over the new source."""


@dataclass(frozen=True)
class Way:
    """One way to sleep on the same tokens."""

    about: str
    teacher: float
    """Weight of the awake model's distribution on the new source."""
    anchor: float
    """Weight of the base's distribution on its own sources."""


WAYS: Dict[str, Way] = {
    "distilled": Way("half of the loss from the awake model on new text, half from the base on its own", 0.5, 0.5),
    "distilled alone": Way("no true token: only what the awake model and the base say", 1.0, 1.0),
    "off": Way("distillation switched off: true tokens alone", 0.0, 0.0),
}


@dataclass(frozen=True)
class Outcome:
    """One seed and one way, in bits per byte."""

    way: str
    seed: int
    awake_gain: float
    """The base's figure on the new source less the awake model's."""
    gain: float
    """The same of the student, its fast levels at rest."""
    lost: float
    """What the base's source that fares worst has lost; negative: gained."""
    awake_lost: float
    """The same of the awake model."""

    @property
    def kept(self) -> float:
        """Share of the awake model's gain that the student has."""
        return self.gain / self.awake_gain


def wake(model: NestedLM, segment: Segment, batch: int) -> NestedLM:
    """Read a source once and write the learner's levels alone; returns the awake model."""
    levels = OnlineLevels(model, [n for n, level in model.level_configs.items() if level.owner == "learner"])
    for first in range(0, len(segment.tokens_NS), batch):
        levels.learn(torch.from_numpy(segment.tokens_NS[first : first + batch]).to(next(model.parameters()).device))
    return model.requires_grad_(False)


def sleep(student: NestedLM, awake: NestedLM, material: Material, way: Way, seed: int) -> NestedLM:
    """A round in which the pool's levels alone learn; fast levels stay as they are."""
    anchor, new, old = frozen_copy(student), material.segments[0].tokens_NS, material.base.tokens_NS
    student.train_only("pool")
    cfg = replace(material.cfg.sleep, teacher=way.teacher, anchor=way.anchor)
    optimizer = build_optimizer([p for p in student.parameters() if p.requires_grad], replace(cfg.optimizer, lr=LR))
    half, random = cfg.batch // 2, np.random.default_rng([seed, 9])
    steps = int(PASSES * len(new)) // half
    order = np.concatenate([random.permutation(len(new)) for _ in range(int(PASSES) + 1)])
    recent_B = torch.arange(2 * half) < half
    device = next(student.parameters()).device
    for step in range(steps):
        mine = new[order[step * half : (step + 1) * half]]
        rows = np.concatenate([mine, old[random.integers(len(old), size=half)]])
        tokens_BS, mask_B = torch.from_numpy(rows).to(device), recent_B.to(device)
        guides = guide_logits(awake if way.teacher else None, anchor if way.anchor else None, tokens_BS, mask_B)
        loss, _ = sleep_loss(student(tokens_BS[:, :-1]), tokens_BS, mask_B, guides, cfg)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.optimizer.clip or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(LR, step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return student.requires_grad_(False)


def measure(material: Material, shop: Workshop, seeds: Sequence[int]) -> List[Outcome]:
    """Every way with every seed; ways of a seed share base and awake model."""
    found = []
    device, new = shop.device, material.segments[0].name
    for seed in seeds:
        weights = shop.base(material, seed, scratch=False)

        def scores(model: NestedLM) -> Dict[str, float]:
            return score(model, material.probes, material.sources)

        def lost(of: Dict[str, float], base: Dict[str, float]) -> float:
            return max(of[s] - base[s] for s in material.base_sources)

        base = scores(fresh_model(material, weights, device))
        awake_model = wake(fresh_model(material, weights, device), material.segments[0], material.cfg.wake.batch)
        awake = scores(awake_model)
        for name, way in WAYS.items():
            student = scores(sleep(fresh_model(material, weights, device), awake_model, material, way, seed))
            gains = base[new] - awake[new], base[new] - student[new]
            found.append(Outcome(name, seed, *gains, lost(student, base), lost(awake, base)))
            print(f"seed {seed}, {name}: kept {found[-1].kept:.0%}, lost {found[-1].lost:+.3f}", flush=True)
    return found


def summary(outcomes: Sequence[Outcome]) -> Dict[str, Any]:
    """Medians over seeds by way, and whether both ways that distil keep what they have to."""
    ways = {
        name: {
            "kept": asdict(Spread.of(o.kept for o in outcomes if o.way == name)),
            "lost": asdict(Spread.of(o.lost for o in outcomes if o.way == name)),
        }
        for name in WAYS
    }
    judged = [way for name, way in ways.items() if name != "off"]
    met = all(w["kept"]["median"] >= LEAST_KEPT and w["lost"]["median"] <= MOST_LOST for w in judged)
    return {"ways": ways, "met": met}


def render(outcomes: Sequence[Outcome], material: Material) -> str:
    """Markdown: median (least .. most) over seeds."""
    rows = []
    for name, way in WAYS.items():
        mine = [o for o in outcomes if o.way == name]
        rows.append(
            [
                name,
                Spread.of(o.awake_gain for o in mine).show(".3f"),
                Spread.of(o.gain for o in mine).show(".3f"),
                Spread.of(100 * o.kept for o in mine).show(".0f"),
                Spread.of(o.lost for o in mine).show("+.3f"),
                Spread.of(o.awake_lost for o in mine).show("+.3f"),
                way.about,
            ]
        )
    header = ["sleep", "gain awake", "gain asleep", "kept %", "lost asleep", "lost awake", "loss"]
    new, cfg = material.segments[0], material.cfg
    return "\n\n".join(
        [
            f"New source `{new.name}`, {len(new.tokens_NS) * cfg.model.context / 1024:.0f} KiB, base "
            f"{', '.join(material.base_sources)}; {PASSES:g} passes at step size {LR:g}, half of every batch from the "
            f"base's text; {len(mine)} seeds. Bits per byte; *lost*: by the base's source that fares worst. Required "
            f"of both that distil: kept at least {LEAST_KEPT:.0%}, lost at most {MOST_LOST}.",
            markdown_table(header, rows),
        ]
    )


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="key=value on top of the micro preset")
    parser.add_argument("--data", required=True, help="folder of NAME/train.txt and NAME/valid.txt")
    parser.add_argument("--new", default="play", help="the source to learn")
    parser.add_argument("--base", default="wiki,math", help="the sources that are known already")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder that keeps bases between runs")
    parser.add_argument("--json", type=Path, help="also write {summary, outcomes} to this file")
    args = parser.parse_args()
    overrides = [*stream_of_folder([f"stream.path={args.data}"]), f"stream.sources=[{args.new}]"]
    cfg = load_config("default", [*overrides, f"base.sources=[{args.base}]", "sleep.batch=8", *args.overrides], "micro")
    material = load_material(cfg, "A")
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        outcomes = measure(material, Workshop(args.work or Path(folder), cfg), range(args.seeds))
    page = render(outcomes, material)
    print(page)
    if args.json:
        payload = {"summary": summary(outcomes), "outcomes": [asdict(o) for o in outcomes]}
        payload["machine"] = Machine.here().show()
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_durably(args.json, (json.dumps(payload, indent=1) + "\n").encode())
        name = f"python -m benchmarks.transfer --data DIR --new {args.new} --base {args.base} --seeds {args.seeds}"
        keep_page(args.json, " ".join([name, *args.overrides]), page)


if __name__ == "__main__":
    main()
