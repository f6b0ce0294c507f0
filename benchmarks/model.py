"""What nested levels cost beside a plain transformer of as many parameters. `python -m benchmarks.model`.

Ratios are tokens per CPU-second of one thread (per second on a GPU) by those of the plain transformer, trained in full
on the same shape, just before and just after. `--json FILE` writes them as `{"ratios": {...}, ...}`.
Shapes: B batch, S sequence (T + 1), T tokens, D model width, H heads, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.interleave import Rate, Variant, interleave, one_thread, timed
from benchmarks.peak_memory import PeakMemory
from benchmarks.peers import PEERS, Running, running_peers
from benchmarks.results import keep_page
from benchmarks.tables import Machine, markdown_table
from benchmarks.variants import OPTIMIZER, Change, NestedVariants, Shape, as_it_is, compile_once, size_of
from nl_model.model import resolve_device
from pipelines.sleep.engine import LocalEngine
from pipelines.sleep.training import Batch, training_step

REQUIRED = {
    "wake_fast_only": 1.3,
    "all_levels_stream_period": 0.95,
    "per_sequence_fast_chunk64": 0.5,
    "self_modifying_titans": 0.25,
}
"""Least ratio of each way."""
LARGEST_WAKE_MEMORY = 0.8
"""Largest peak of a wake step by that of a full step of the same model."""
ABOUT = {
    "reference": "plain transformer, every parameter trained in every step",
    "wake_fast_only": "fast level written every step, medium every second; slow at rest",
    "all_levels_stream_period": "all levels trained, periods of 16, 64 and 256 steps; all three are written in every "
    "visit of 4 steps, so this is the most that it can cost",
    "all_levels_every_step": "all levels written in every step",
    "per_sequence_fast_chunk64": "fresh sequences that write a fast level of their own every 64 tokens, medium at 256",
    "self_modifying_titans": "self-modifying memories in place of attention, every parameter trained in every step",
    "forward": "forward pass alone, nothing learned",
    "forward_compiled": "the same, torch.compile",
    "wake_compiled": "wake_fast_only, torch.compile",
    "reference_compiled": "reference, torch.compile",
}


# -- the plain transformer ---------------------------------------------------------------------------------------------


class PlainBlock(nn.Module):
    """Pre-norm attention and an MLP four times as wide: (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Attention, then the MLP, each with norm and residual."""
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(self.attention_norm(x_BTD)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(y_BHTK.transpose(1, 2).reshape(B, T, D))
        return x_BTD + self.down(F.gelu(self.up(self.mlp_norm(x_BTD))))


class PlainTransformer(nn.Module):
    """Decoder with learned positions, the cheapest there are."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.dim)
        self.positions = nn.Parameter(0.02 * torch.randn(shape.context, shape.dim))
        self.blocks = nn.ModuleList(PlainBlock(shape.dim, shape.heads) for _ in range(shape.blocks))
        self.norm = nn.LayerNorm(shape.dim, bias=False)
        self.head = nn.Linear(shape.dim, shape.vocabulary, bias=False)

    def nll(self, sequences_BS: Tensor) -> Tensor:
        """Loss per predicted token, float32 (B, T)."""
        x_BTD = self.embedding(sequences_BS[:, :-1]) + self.positions
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_NV = self.head(self.norm(x_BTD)).flatten(0, 1)
        targets_BT = sequences_BS[:, 1:]
        return F.cross_entropy(logits_NV, targets_BT.flatten(), reduction="none").view_as(targets_BT)


@dataclass(frozen=True)
class PlainLoss:
    """The objective of the plain transformer, whose loss may be a compiled one."""

    nll: Callable[[Tensor], Tensor]

    def loss(self, step: int, forward: Callable[[Tensor], Tensor], batch: Batch) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Mean loss in nats per token."""
        return self.nll(batch.tokens_BS).mean(), {}


def plain_variant(shape: Shape, change: Change = as_it_is) -> Variant:
    """The reference: every parameter trained in every step, by the training step of a run."""
    torch.manual_seed(0)
    model = PlainTransformer(shape).to(shape.device)
    engine = LocalEngine(model, OPTIMIZER)  # type: ignore[arg-type]  # asks no more than a module's of it
    objective, lr = PlainLoss(change(model.nll)), OPTIMIZER.lr
    recent_B, keys_B = torch.ones(shape.batch, dtype=torch.bool), np.arange(shape.batch)

    def step() -> None:
        training_step(engine, objective, 0, Batch(shape.draw(), recent_B, keys_B), lr, shape.precision)

    return Variant(step, shape.step_tokens, parameters=size_of(model))


# -- measuring ---------------------------------------------------------------------------------------------------------


def builders(shape: Shape, compiled: bool) -> Tuple[Dict[str, Callable[[], Variant]], Dict[str, str]]:
    """What makes each way beside the reference, and why some cannot be made here."""
    with torch.device("meta"):
        nested = NestedVariants(shape, size_of(PlainTransformer(shape)))
    ways: Dict[str, Callable[[], Variant]] = {
        "wake_fast_only": nested.wake,
        "all_levels_stream_period": partial(nested.levels, (16, 64, 256), steps=4),
        "all_levels_every_step": nested.full,
        "per_sequence_fast_chunk64": nested.sequences,
        "self_modifying_titans": partial(nested.full, mixer="titans"),
        "forward": nested.forward,
    }
    missing = {}
    if find_spec("nl_model.memory.titans") is None:
        missing["self_modifying_titans"] = "nl_model.memory.titans is not there"
    if compiled:
        ways["forward_compiled"] = partial(nested.forward, compile_once)
        ways["wake_compiled"] = partial(nested.wake, compile_once)
        ways["reference_compiled"] = partial(plain_variant, shape, compile_once)
        if not any(shutil.which(name) for name in ("g++", "clang++")):
            missing.update({name: "no C++ compiler (g++ or clang++) found" for name in ways if "compiled" in name})
    return {name: make for name, make in ways.items() if name not in missing}, missing


@dataclass(frozen=True)
class Figures:
    """What was measured."""

    shape: Shape
    repeats: int
    rates: Dict[str, Rate]
    parameters: Dict[str, int]
    peak_bytes: Dict[str, int]
    """Most bytes of live tensors during a step."""
    missing: Dict[str, str] = field(default_factory=dict)
    """Why a way was not measured."""

    def ratios(self) -> Dict[str, float]:
        """Median ratio of every way to the reference, and the peak of a wake step to that of a full step."""
        ratios = {name: rate.ratio.median for name, rate in self.rates.items() if name != "reference"}
        if self.peak_bytes:
            ratios["wake_peak_memory"] = self.peak_bytes["wake_fast_only"] / self.peak_bytes["all_levels_every_step"]
        return ratios

    def as_json(self) -> Dict[str, Any]:
        """Everything, the ratios first."""
        required = {**REQUIRED, "wake_peak_memory": LARGEST_WAKE_MEMORY}
        return {"ratios": self.ratios(), "required": required, **asdict(self), "machine": asdict(Machine.here())}


def measure(
    shape: Shape = Shape(),  # noqa: B008 (frozen)
    repeats: int = 5,
    compiled: bool = True,
    peers: Optional[Running] = None,
) -> Figures:
    """Rates of all ways, in turns with the reference, and the memory of three of them.

    Args:
        compiled: also what torch.compile makes of them (a minute or two more).
        peers: other implementations to run beside.

    Raises:
        ValueError: repeats < 1, or a device that is not there.
    """
    shape = Shape(**{**asdict(shape), "device": str(resolve_device(shape.device))})
    device = torch.device(shape.device)
    with one_thread():
        makers, missing = builders(shape, compiled)
        peaks = {name: peak_bytes(make) for name, make in makers.items() if name in _WEIGHED}
        peaks["reference"] = peak_bytes(partial(plain_variant, shape))
        ways = {"reference": plain_variant(shape), **{name: make() for name, make in makers.items()}}
        for name, reason in _warm_up(ways).items():
            missing[name] = reason
            del ways[name]
        visits = {name: timed(way, device) for name, way in ways.items()}
        parameters = {name: way.parameters for name, way in ways.items()}
        if peers is not None:
            visits.update(peers.visits)
            parameters.update(peers.parameters)
            missing.update(peers.missing)
        rates = interleave(visits.pop("reference"), visits, repeats)
    return Figures(shape, repeats, rates, parameters, peaks, missing)


_WEIGHED = ("wake_fast_only", "all_levels_every_step", "per_sequence_fast_chunk64", "self_modifying_titans")


def _warm_up(ways: Dict[str, Variant]) -> Dict[str, str]:
    """One visit each: optimizer state, caches, compilation; returns what torch.compile could not do, and why."""
    failed = {}
    for name, way in ways.items():
        try:
            way.begin()
            for _ in range(way.steps):
                way.step()
        except torch._dynamo.exc.TorchDynamoException as error:
            failed[name] = f"torch.compile: {str(error).strip().splitlines()[0]}"
    return failed


def peak_bytes(make: Callable[[], Variant]) -> int:
    """Most bytes of live tensors during the second visit to a way, when the optimizers have their moments."""
    with PeakMemory() as live:
        way = make()
        for _ in range(2):
            live.restart()
            way.begin()
            for _ in range(way.steps):
                way.step()
    return live.peak


# -- the report --------------------------------------------------------------------------------------------------------


def render(figures: Figures) -> str:
    """Markdown: one row per way, and what each is."""
    shape, per = figures.shape, "tokens/CPU-s" if figures.shape.device == "cpu" else "tokens/s"
    rows = []
    for name, rate in figures.rates.items():
        required = f"{REQUIRED[name]:.2f}" if name in REQUIRED else ""
        peak = f"{figures.peak_bytes[name] / 2**20:.0f}" if name in figures.peak_bytes else ""
        cells = [f"{figures.parameters[name]:,}", rate.tokens_per_s.show(",.0f"), rate.ratio.show(".2f")]
        rows.append([name, *cells, required, peak])
    about = (
        f"dim {shape.dim}, {shape.blocks} blocks, vocabulary {shape.vocabulary:,}, {shape.batch} sequences of "
        f"{shape.context} tokens, {shape.precision}, AdamW, {shape.device}, one thread; {figures.repeats} repeats, the "
        "reference before and after each. *peak MiB*: most bytes of live tensors during a step."
    )
    header = ["way", "parameters", per, "by the reference's", "required", "peak MiB"]
    about_all = {**ABOUT, **{name: peer.about for name, peer in PEERS.items()}}
    notes = [f"* {name}: {about_all[name]}." for name in figures.rates]
    notes += [f"* {name}: not measured ({reason})." for name, reason in figures.missing.items()]
    parts = [about, markdown_table(header, rows)]
    if figures.peak_bytes:
        ratio = figures.ratios()["wake_peak_memory"]
        parts.append(
            f"wake_peak_memory: a wake step's peak is {ratio:.2f} of that of a full step of the same model "
            f"(at most {LARGEST_WAKE_MEMORY:.2f} required)."
        )
    return "\n\n".join([*parts, "\n".join(notes)])


def main() -> None:
    """Measure, print the table, and write the figures where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--no-compile", action="store_true", help="without the rows of torch.compile")
    parser.add_argument("--peers", action="store_true", help="install other implementations and run them beside")
    options = parser.parse_args()
    shape = Shape(device=options.device, precision=options.precision)
    with running_peers(shape, peers=PEERS if options.peers else {}) as peers:
        figures = measure(shape, options.repeats, not options.no_compile, peers)
    print(render(figures))
    if options.json:
        options.json.write_text(json.dumps(figures.as_json(), indent=2) + "\n")
        keep_page(options.json, render(figures))


if __name__ == "__main__":
    main()
