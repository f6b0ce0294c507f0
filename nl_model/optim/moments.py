"""What an optimizer keeps of its parameters between steps, by name: to write it down, and to go on from it.

Torch's AdamW and SGD keep the same of every parameter. An optimizer of whole matrices (`matrix.py`) says in its groups
which of its parameters AdamW writes instead; those have AdamW's moments and step counter, its matrices have others.
"""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Mapping

import torch
from torch import Tensor

ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")


def moments_in(state: Mapping[str, Any]) -> List[str]:
    """Names of what is kept per number of a parameter."""
    return sorted(key for key, value in state.items() if torch.is_tensor(value) and value.dim())


def counters_of(optimizer: torch.optim.Optimizer) -> Dict[str, float]:
    """Counters by name (AdamW's `step`). They are the same for every parameter that has them."""
    states: Iterable[Mapping[str, Any]] = optimizer.state.values()
    scalars = ((k, v) for state in states for k, v in state.items() if torch.is_tensor(v) and not v.dim())
    found: Dict[str, Tensor] = {}
    for key, value in scalars:
        found.setdefault(key, value)
    return {key: float(value) for key, value in found.items()}  # one by one, a GPU is waited for


def blank_state(
    group: Mapping[str, Any], like: Tensor, moments: Iterable[str], counters: Mapping[str, float]
) -> Dict[str, Tensor]:
    """Zeros for those of the moments that an optimizer keeps in a group, and its counters.

    Args:
        group: of the optimizer; without an entry `matrix` all its moments are for all parameters.
        like: the parameter, or the flat shard of many.
        moments: names of all that is known of the optimizer.
        counters: to go on from.
    """
    matrix = group.get("matrix")
    mine = [name for name in moments if matrix is None or matrix != (name in ADAMW_MOMENTS)]
    found = {name: torch.zeros_like(like, requires_grad=False) for name in mine}
    if mine and not matrix:
        found |= {k: torch.tensor(v, dtype=torch.float32, device=like.device) for k, v in counters.items()}
    return found
