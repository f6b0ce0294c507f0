"""The control: the same network trained plainly on the same stream, in the same order, with the same FLOPs.

All levels share one frequency (every step), nothing is replayed, nobody sleeps. The FLOPs that Circadian spends
on sleep buy the control further passes over each stretch of the stream before it moves on.
"""

from __future__ import annotations

from typing import Callable, Iterator, List, Mapping, Tuple

import numpy as np
import torch

from nl_model.flops import full_step_flops
from nl_model.model import NestedLM, autocast
from nl_model.optim.levelwise import build_optimizer
from pipelines.config.schema import Config
from pipelines.data.stream import Probe, Stream
from pipelines.gate.probe import Row, score
from pipelines.sleep.schedule import learning_rate


def blocks_of(stream: Stream, period: int, cfg: Config) -> Iterator[np.ndarray]:
    """The stream in stretches of `period` tokens: (sequences, context + 1) each; a short rest joins the last."""
    per_block = period // cfg.model.context
    held: List[np.ndarray] = []
    while batch := stream.next_batch(cfg.wake.batch):
        held.extend(s.tokens for s in batch)
        if len(held) >= 2 * per_block:
            yield np.stack(held[:per_block])
            held = held[per_block:]
    if len(held) >= per_block and len(held) - per_block >= per_block // 10:
        yield np.stack(held[:per_block])
        held = held[per_block:]
    if held:
        yield np.stack(held)


def train_control(
    model: NestedLM,
    stream: Stream,
    probes: Mapping[str, Probe],
    sources: List[str],
    cfg: Config,
    lr: float,
    flops_per_token: float,
    on_row: Callable[[Row], None],
    on_step: Callable[[int], None] = lambda step: None,
) -> Tuple[List[Row], float]:
    """Train a model plainly and score it after every stretch; returns the rows of its matrix and the FLOPs spent.

    Args:
        model: starts with the weights of the base; every parameter is trained.
        stream: at its beginning.
        lr: peak step size; re-warmed, with a cosine, over every stretch.
        flops_per_token: FLOPs that may be spent per stream token, the total of wake and sleep.
        on_row: called with every row of the matrix, the base's first.
        on_step: called after every step with the number of steps so far.
    """
    period = min(level.period for level in cfg.levels.values() if level.owner == "pool")
    size, context = cfg.sleep.batch, cfg.model.context
    step_flops = full_step_flops(cfg.model, cfg.levels, model.vocab_size) * size * context
    model.requires_grad_(True)
    optimizer = build_optimizer(list(model.parameters()), cfg.sleep.optimizer, model)
    rows, tokens, budget, done = [Row(0, 0, score(model, probes, sources, cfg.compute.precision))], 0, 0.0, 0
    on_row(rows[0])
    for number, block in enumerate(blocks_of(stream, period, cfg), start=1):
        tokens += len(block) * context
        budget += flops_per_token * len(block) * context
        steps = int(budget // step_flops) - done
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(lr, step, steps)
            first = step * size % max(size, len(block) - len(block) % size)
            plain_step(model, optimizer, block[first : first + size], cfg)
            done += 1
            on_step(done)
        rows.append(Row(number, tokens, score(model, probes, sources, cfg.compute.precision)))
        on_row(rows[-1])
    return rows, done * float(step_flops)


def plain_step(model: NestedLM, optimizer: torch.optim.Optimizer, tokens: np.ndarray, cfg: Config) -> None:
    """One full training step on sequences (B, S): forward, backward through everything, clip, write."""
    device = next(model.parameters()).device
    with autocast(device, cfg.compute.precision):
        loss = model.nll(torch.from_numpy(tokens.astype(np.int64)).to(device)).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.sleep.optimizer.clip or float("inf"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
