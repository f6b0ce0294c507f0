"""A million tokens through fixed-size memory, learning all the while. `python -m benchmarks.streaming`.

One stream is read by a small model whose fast levels are written on the way. Neither memory nor the time of a token
may depend on how many tokens came before.
Shapes: B sequences (one), N tokens of a call, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, List, Tuple

import psutil
import torch
from torch import Tensor

from benchmarks.interleave import clock, one_thread
from benchmarks.results import keep_page
from benchmarks.tables import Machine, markdown_table
from nl_model.config import LevelConfig, ModelConfig, OptimizerConfig
from nl_model.losses import token_nll
from nl_model.model import NestedLM, resolve_device
from nl_model.streaming import StreamingModel

BLOCK = 10_000
"""Tokens between two looks at the clock; memory is held against what it was after the first block."""
CALL = 2_000
"""Tokens per call."""
VOCABULARY, PHRASES, PHRASE = 256, 64, 25
LARGEST_GROWTH, LARGEST_DRIFT = 0.02, 0.10


@dataclass(frozen=True)
class StreamFigures:
    """What reading one long stream took."""

    tokens: int
    early_bytes: int
    """Resident memory of the process after the first block."""
    late_bytes: int
    """The same after the last token."""
    early_state: int
    """Bytes of the stream's state (fast weights, moments, memories) after the first block."""
    late_state: int
    microseconds: List[float]
    """Time per token of each block after the first: of the CPU, or of the GPU where there is one."""
    early_loss: float
    """Mean loss of the first block, scored before learning, in nats per token."""
    late_loss: float
    """The same of the last block."""

    @property
    def growth(self) -> float:
        """Resident memory at the end by that after the first block, minus one."""
        return self.late_bytes / self.early_bytes - 1

    @property
    def drift(self) -> float:
        """Time per token at the end by that at the start, minus one; medians of a fifth of the blocks each."""
        fifth = max(1, len(self.microseconds) // 5)
        return statistics.median(self.microseconds[-fifth:]) / statistics.median(self.microseconds[:fifth]) - 1

    @property
    def flat(self) -> bool:
        """Whether both stay within what is allowed."""
        return abs(self.growth) <= LARGEST_GROWTH and abs(self.drift) <= LARGEST_DRIFT


def mixers() -> Tuple[str, ...]:
    """Mixers with memory of a fixed size."""
    return ("attention", "titans") if find_spec("nl_model.memory.titans") else ("attention",)


def build(mixer: str, device: torch.device) -> NestedLM:
    """A model of 0.2M parameters; attention sees 64 tokens back."""
    optimizer = OptimizerConfig(lr=1e-2)
    levels = {
        "fast": LevelConfig(100, width=128, optimizer=optimizer),
        "medium": LevelConfig(500, width=128, optimizer=optimizer),
        "slow": LevelConfig(5000, width=128, blocks="all", owner="pool"),
    }
    cfg = ModelConfig(dim=64, blocks=2, heads=2, context=256, mixer=mixer, window=64 if mixer == "attention" else 0)
    model = NestedLM(cfg, levels, VOCABULARY).reset_parameters(seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # or else no gradient would reach the fast levels
                parameter.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(1))
    return model.to(device)


def phrases(tokens: int, device: torch.device) -> Iterator[Tensor]:
    """A stream of phrases in random order, some tokens at a time: int64 (1, N)."""
    generator = torch.Generator().manual_seed(0)
    known = torch.randint(VOCABULARY, (PHRASES, PHRASE), generator=generator)
    for at in range(0, tokens, CALL):
        chosen = torch.randint(PHRASES, (CALL // PHRASE,), generator=generator)
        yield known[chosen].view(1, -1)[:, : tokens - at].to(device)


def read(mixer: str, tokens: int = 1_000_000, device: str = "cpu") -> StreamFigures:
    """Read a stream with a model of one mixer, learning on.

    Raises:
        ValueError: fewer than two blocks of tokens.
    """
    if tokens < 2 * BLOCK:
        raise ValueError(f"tokens={tokens} must be at least {2 * BLOCK}: two blocks of {BLOCK}")
    with one_thread():
        where = resolve_device(device)
        stream = StreamingModel(build(mixer, where), batch=1)
        seconds: List[float] = []
        losses: List[float] = []
        memory: List[int] = []
        states: List[int] = []
        seen, spent, total = 0, 0.0, 0.0
        for part_1N in phrases(tokens, where):
            start = clock(where)
            logits_1NV = stream.feed(part_1N)
            total += token_nll(logits_1NV[:, :-1], part_1N[:, 1:]).sum().item()
            spent += clock(where) - start
            seen += part_1N.size(1)
            if seen % BLOCK == 0 or seen == tokens:
                block = seen - BLOCK * len(seconds)
                seconds.append(spent / block)
                losses.append(total / block)
                memory.append(psutil.Process().memory_info().rss)
                states.append(sum(t.nbytes for t in stream.state_dict().values()))
                spent = total = 0.0
    per_token = [1e6 * s for s in seconds[1:]]
    return StreamFigures(tokens, memory[0], memory[-1], states[0], states[-1], per_token, losses[0], losses[-1])


def as_json(found: Dict[str, StreamFigures]) -> Dict[str, Any]:
    """All figures by mixer, and whether each is flat."""
    made = {
        mixer: {**asdict(figures), "growth": figures.growth, "drift": figures.drift, "flat": figures.flat}
        for mixer, figures in found.items()
    }
    return {"streams": made, "machine": asdict(Machine.here())}


def render(found: Dict[str, StreamFigures]) -> str:
    """Markdown: one row per mixer."""
    header = ["mixer", "tokens", "resident MiB", "growth", "state KiB", "us per token", "drift", "loss", "flat"]
    rows: List[Sequence[str]] = []
    for mixer, f in found.items():
        resident = f"{f.early_bytes / 2**20:.1f} -> {f.late_bytes / 2**20:.1f}"
        state = f"{f.early_state / 2**10:.0f} -> {f.late_state / 2**10:.0f}"
        time = f"{statistics.median(f.microseconds):.1f}"
        loss = f"{f.early_loss:.2f} -> {f.late_loss:.2f}"
        verdict = "yes" if f.flat else "no"
        rows.append(
            [mixer, f"{f.tokens:,}", resident, f"{f.growth:+.1%}", state, time, f"{f.drift:+.1%}", loss, verdict]
        )
    about = (
        f"One stream, read and learned from; figures after {BLOCK:,} tokens -> at the end. *drift*: time per token of "
        f"the last fifth by the first, medians of blocks of {BLOCK:,} tokens. Flat: growth within "
        f"{LARGEST_GROWTH:.0%}, drift within {LARGEST_DRIFT:.0%}."
    )
    return f"{about}\n\n{markdown_table(header, rows)}"


def measure(tokens: int = 1_000_000, device: str = "cpu") -> Dict[str, StreamFigures]:
    """Read a stream with every mixer whose memory is fixed."""
    return {mixer: read(mixer, tokens, device) for mixer in mixers()}


def main() -> None:
    """Read, print the figures, and write them where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    found = measure(options.tokens, options.device)
    print(render(found))
    if options.json:
        options.json.write_text(json.dumps(as_json(found), indent=2) + "\n")
        keep_page(options.json, render(found))


if __name__ == "__main__":
    main()
