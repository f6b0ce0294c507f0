"""Optimizers by name. The package docstring says how to add one."""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterable, List, Optional

import torch
from torch import nn
from torch.nn import Parameter

from nl_model.config import OptimizerConfig

Builder = Callable[[List[Parameter], OptimizerConfig, Optional[nn.Module]], torch.optim.Optimizer]
"""(parameters, configuration, the model they belong to or None) -> optimizer."""
OPTIMIZERS: Dict[str, Builder] = {}
HEADS = ("head", "lm_head", "embed_out")
"""Last parts of the module names that output projections go by."""


def register(name: str) -> Callable[[Builder], Builder]:
    """Decorator that makes a builder known under the name that configurations use."""

    def add(builder: Builder) -> Builder:
        assert name not in OPTIMIZERS, f"two optimizers are called {name}"
        OPTIMIZERS[name] = builder
        return builder

    return add


def build_optimizer(
    parameters: Iterable[Parameter], cfg: OptimizerConfig, model: Optional[nn.Module] = None
) -> torch.optim.Optimizer:
    """The optimizer that a level's configuration names.

    Args:
        parameters: what it writes.
        cfg: its settings.
        model: whose parameters these are. dgd needs it, to see the inputs of layers; muon, deep_momentum and m3 need it
            to leave embeddings and heads to AdamW, without it these are matrices like any other.
    """
    return OPTIMIZERS[cfg.name](list(parameters), cfg, model)


def lookup_tables(model: Optional[nn.Module]) -> List[Parameter]:
    """Embeddings and output heads of a model: matrices whose rows stand for tokens, not for directions."""
    found: List[Parameter] = []
    for name, module in model.named_modules() if model is not None else ():
        is_head = isinstance(module, nn.Linear) and name.rpartition(".")[2] in HEADS
        if is_head or isinstance(module, nn.Embedding):
            found += list(module.parameters(recurse=False))
    return found


def matrix_settings(cfg: OptimizerConfig, model: Optional[nn.Module]) -> Dict[str, Any]:
    """What a level's configuration says to every optimizer of whole matrices: muon, deep_momentum, m3."""
    return {
        "lr": cfg.lr,
        "ns_steps": cfg.ns_steps,
        "weight_decay": cfg.weight_decay,
        "others": lookup_tables(model),
        "betas": (cfg.beta1, cfg.beta2),
        "eps": cfg.eps,
        "adamw_scale": cfg.adamw_scale,
    }
