"""FLOPs, counted one way for everyone: two per multiply-add of every matrix product, nothing else.

Agrees with torch.utils.flop_counter (tests/unit/test_flops.py). Attention counts the whole score matrix, as torch does.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Dict, Sequence, Tuple

from nl_model.config import LevelConfig, ModelConfig, OptimizerConfig, ordered_levels


def forward_flops(cfg: ModelConfig, levels: Dict[str, LevelConfig], vocab_size: int) -> int:
    """FLOPs per token of one forward pass over full sequences."""
    if cfg.mixer != "attention":
        return _counted(cfg, tuple(levels.items()), vocab_size)[0]
    per_block = 2 * 4 * cfg.dim**2 + 4 * cfg.context * cfg.dim
    mlps = sum(4 * cfg.dim * level.width * len(level.block_indices(cfg.blocks)) for level in levels.values())
    return cfg.blocks * per_block + mlps + 2 * cfg.dim * vocab_size


def full_step_flops(cfg: ModelConfig, levels: Dict[str, LevelConfig], vocab_size: int) -> int:
    """FLOPs per token of forward and backward with every parameter trained."""
    if cfg.mixer != "attention":
        return _counted(cfg, tuple(levels.items()), vocab_size)[1]
    # Two backward products per forward product; attention recomputes its scores (five products instead of four).
    return 3 * forward_flops(cfg, levels, vocab_size) + cfg.blocks * 2 * cfg.context * cfg.dim


def wake_step_flops(cfg: ModelConfig, levels: Dict[str, LevelConfig], vocab_size: int) -> int:
    """FLOPs per token of a wake step: forward, and backward down to the lowest MLP that the learner owns."""
    if cfg.mixer != "attention":
        return _counted(cfg, tuple(levels.items()), vocab_size)[2]
    learners = [name for name, level in levels.items() if level.owner == "learner"]
    return forward_flops(cfg, levels, vocab_size) + _backward_flops(cfg, levels, vocab_size, learners, learners)


def sleep_step_flops(
    cfg: ModelConfig, levels: Dict[str, LevelConfig], vocab_size: int, receivers: Sequence[str], rank: int = 0
) -> int:
    """FLOPs per token of a sleep step that trains some levels only, guides apart (whole, for mixers without a formula).

    Args:
        receivers: levels that train.
        rank: total rank of the new slots of each of their MLPs, which then train instead of the levels' own weights.
    """
    slowest = ordered_levels(levels)[-1]
    if cfg.mixer != "attention":
        return full_step_flops(cfg, levels, vocab_size)
    if rank == 0 and slowest in receivers:  # embedding and mixers train: only MLPs of other levels are spared
        spared = [level for name, level in levels.items() if name not in receivers]
        gradients = sum(4 * cfg.dim * level.width * len(level.block_indices(cfg.blocks)) for level in spared)
        return full_step_flops(cfg, levels, vocab_size) - gradients
    forward = forward_flops(cfg, levels, vocab_size)
    backward = _backward_flops(cfg, levels, vocab_size, receivers, () if rank else receivers)
    sizes = [(levels[r].width + cfg.dim) * len(levels[r].block_indices(cfg.blocks)) for r in receivers]
    updates = 3 * 4 * rank * sum(sizes) - 2 * rank * cfg.dim  # nothing below the first wants its input gradient
    return forward + backward + updates


def _backward_flops(
    cfg: ModelConfig, levels: Dict[str, LevelConfig], vocab_size: int, reached: Sequence[str], trained: Sequence[str]
) -> int:
    """FLOPs per token of a backward pass down to the lowest MLP of the levels `reached`.

    Weight gradients are those of the MLPs of the levels `trained`.
    """
    order = ordered_levels(levels)
    places = {name: levels[name].block_indices(cfg.blocks) for name in order}
    chain = [(block, name) for block in range(cfg.blocks) for name in order if block in places[name]]
    first = next(i for i, (_, name) in enumerate(chain) if name in reached)
    backward = 2 * cfg.dim * vocab_size  # through the head, to its input only
    for i, (_block, name) in enumerate(chain[first:]):
        product = 2 * cfg.dim * levels[name].width
        backward += product  # input gradient of the down projection
        backward += product if i > 0 else 0  # input gradient of the up projection; nothing below the first wants it
        backward += 2 * product if name in trained else 0  # weight gradients
    blocks_above = cfg.blocks - 1 - chain[first][0]
    return backward + blocks_above * (2 * 4 * cfg.dim**2 + 10 * cfg.context * cfg.dim)


def write_flops(cfg: ModelConfig, levels: Dict[str, LevelConfig], vocab_size: int, optimizer: OptimizerConfig) -> int:
    """FLOPs of the matrix products of one write of all parameters: none for optimizers that go number by number.

    Muon's Newton-Schulz iteration has three products per step on every matrix but embedding and head. In a small model
    that writes after few tokens it is a fifth of a training step.
    """
    if optimizer.name != "muon":
        return 0
    return _newton_schulz(cfg, tuple(levels.items()), vocab_size, optimizer.ns_steps)


@lru_cache(maxsize=8)
def _newton_schulz(cfg: ModelConfig, levels: Tuple[Tuple[str, LevelConfig], ...], vocab_size: int, steps: int) -> int:
    import torch  # noqa: PLC0415 (as below)

    from nl_model.model import NestedLM  # noqa: PLC0415
    from nl_model.optim.registry import lookup_tables  # noqa: PLC0415

    with torch.device("meta"):
        model = NestedLM(cfg, dict(levels), vocab_size)
    tables = {id(table) for table in lookup_tables(model)}
    total = 0
    for parameter in model.parameters():
        if parameter.dim() < 2 or id(parameter) in tables:
            continue
        small, large = sorted(parameter.shape[-2:])
        batch = parameter.numel() // (small * large)
        total += batch * steps * (4 * small * small * large + 2 * small**3)
    return total


@lru_cache(maxsize=8)
def _counted(cfg: ModelConfig, levels: Tuple[Tuple[str, LevelConfig], ...], vocab_size: int) -> Tuple[int, int, int]:
    """(forward, full step, wake step) of mixers without a formula: counted by torch on tensors without storage."""
    import torch  # noqa: PLC0415 (nobody else here needs it)
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415

    from nl_model.model import NestedLM  # noqa: PLC0415

    with torch.device("meta"):
        model = NestedLM(cfg, dict(levels), vocab_size)
        sequences_BS = torch.zeros(1, cfg.context + 1, dtype=torch.int64)
    counts = []
    for trained in ("", "all", "learner"):
        if trained == "learner":
            model.train_only("learner")
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(bool(trained)):
            loss = model.nll(sequences_BS).sum()
            if trained:
                loss.backward()
        counts.append(counter.get_total_flops() // cfg.context)
    return counts[0], counts[1], counts[2]
