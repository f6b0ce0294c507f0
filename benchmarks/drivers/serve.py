"""A step as a small server: it waits for a number of steps on stdin, takes them and says how long they took."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Dict

import torch
from torch import Tensor, nn

ANSWER = "answer: "
"""What the lines that count begin with."""
Settings = Dict[str, Any]


def settings() -> Settings:
    """What the caller asks for: the fields of benchmarks.variants.Shape, and `variant`."""
    return json.loads(sys.argv[1])


def tokens(asked: Settings, length: int) -> Tensor:
    """Random sequences: int64 (batch, length)."""
    return torch.randint(asked["vocabulary"], (asked["batch"], length), device=asked["device"])


def autocast(asked: Settings) -> AbstractContextManager[None]:
    """The context of a forward pass in the precision asked for."""
    kind = torch.device(asked["device"]).type
    return torch.autocast(kind, torch.bfloat16, enabled=asked["precision"] == "bf16")


def adamw(model: nn.Module) -> Callable[[Tensor], None]:
    """Backward pass, clipping and write of a peer's training step.

    A step of its own, not the run's: a peer's environment holds nothing of this project, and its package is measured.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def learn(loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return learn


def serve(asked: Settings, model: nn.Module, step: Callable[[], float]) -> None:
    """Warm up with one step, say how large the model is, then obey until stdin ends; one line per answer."""
    step()
    _answer(parameters=sum(p.numel() for p in model.parameters()))
    for line in sys.stdin:
        start, loss = _clock(asked), 0.0
        for _ in range(int(line)):
            loss = step()
        _answer(seconds=_clock(asked) - start, loss=loss)


def _answer(**fields: float) -> None:
    print(ANSWER + json.dumps(fields), flush=True)


def _clock(asked: Settings) -> float:
    if torch.device(asked["device"]).type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
