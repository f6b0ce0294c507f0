"""Growth: a trained model becomes the start of a wider or deeper one that computes the same (knowledge seeding).

Whatever is new begins as a fresh level does: what it reads is drawn at random, what it writes is zero. The new model's
logits are the old one's, and from the first write on gradient reaches everything new. Three ways, which combine:

* wider MLPs: more hidden units, and levels that were not there before;
* more blocks, which begin as the identity, spread evenly among the old ones;
* a wider residual stream x (attention only, heads of the same width): x' = [x / s, 0] with s = sqrt(D / D') has the
  same root mean square, so that norm(x') = [norm(x) / s, 0]: what reads the stream is multiplied by s, what writes to
  it divided by s, and only rounding differs.

Shapes: D model width, W MLP width, V vocabulary, H heads, K width of a head, L levels of a block.
"""

from __future__ import annotations

import math
from typing import Dict, List, Mapping, Optional, Sequence

import torch
from torch import Tensor

from nl_model.config import LevelConfig, ModelConfig, ordered_levels
from nl_model.levelled import is_slot
from nl_model.model import NestedLM

Levels = Mapping[str, LevelConfig]


def grow(
    cfg: ModelConfig,
    levels: Levels,
    state: Mapping[str, Tensor],
    new_cfg: ModelConfig,
    new_levels: Levels,
    seed: int = 0,
    places: Optional[Sequence[int]] = None,
) -> Dict[str, Tensor]:
    """Parameters of a larger model that computes what a trained one does.

    Args:
        cfg, levels: of the trained model.
        state: its parameters by name.
        new_cfg, new_levels: of the larger model; levels are known by their names.
        seed: of what is drawn.
        places: the new number of every old block, ascending; by default they are spread evenly.

    Returns:
        All parameters of `NestedLM(new_cfg, new_levels, vocabulary)`, dtype and device as in `state`.

    Raises:
        ValueError: the target is smaller somewhere, or differs in what cannot be grown.
    """
    _check(cfg, levels, state, new_cfg, new_levels)
    where = list(places) if places is not None else place_blocks(cfg, levels, new_cfg, new_levels)
    _check_places(where, cfg, levels, new_cfg, new_levels)
    embedding_VD = state["embedding.weight"]
    fresh = NestedLM(new_cfg, dict(new_levels), embedding_VD.size(0)).reset_parameters(seed)
    grown = {name: p.detach().to(embedding_VD) for name, p in fresh.named_parameters()}
    if new_cfg.dim > cfg.dim:
        _open_residual(grown, cfg.dim, seed)
    for name, old in state.items():
        target = _renamed(name, where)
        if name.endswith(".mix"):
            block = int(name.split(".")[1])
            present = [_names_at(levels, cfg, block), _names_at(new_levels, new_cfg, where[block])]
            for share, level in zip(old, present[0], strict=True):
                grown[target][present[1].index(level)] = share
        else:
            _overlay(target, grown[target], old, cfg, new_cfg)
    return grown


def grow_model(
    model: NestedLM, new_cfg: ModelConfig, new_levels: Levels, seed: int = 0, places: Optional[Sequence[int]] = None
) -> NestedLM:
    """`grow`, from model to model; same dtype and device."""
    state = {name: p.detach() for name, p in model.named_parameters()}
    grown = grow(model.cfg, model.level_configs, state, new_cfg, new_levels, seed, places)
    larger = NestedLM(new_cfg, dict(new_levels), model.vocab_size).to(model.embedding.weight)
    with torch.no_grad():
        for name, parameter in larger.named_parameters():
            parameter.copy_(grown[name])
    return larger


def place_blocks(cfg: ModelConfig, levels: Levels, new_cfg: ModelConfig, new_levels: Levels) -> List[int]:
    """Where the old blocks go: evenly spread, or as high as the levels that they hold let them.

    Raises:
        ValueError: the larger model has no place for a block with its levels.
    """
    even = [(i + 1) * new_cfg.blocks // cfg.blocks - 1 for i in range(cfg.blocks)]
    wanted = [set(_names_at(levels, cfg, i)) for i in range(cfg.blocks)]
    offered = [set(_names_at(new_levels, new_cfg, i)) for i in range(new_cfg.blocks)]
    if all(wanted[i] <= offered[place] for i, place in enumerate(even)):
        return even
    places: List[int] = []
    for i in reversed(range(cfg.blocks)):
        below = places[0] if places else new_cfg.blocks
        fitting = [place for place in range(i, below) if wanted[i] <= offered[place]]
        if not fitting:
            raise ValueError(
                f"block {i} with levels {', '.join(sorted(wanted[i]))} has no place among model.blocks="
                f"{new_cfg.blocks}; let levels.*.blocks of the larger model name more blocks"
            )
        places.insert(0, fitting[-1])
    return places


def _names_at(levels: Levels, cfg: ModelConfig, block: int) -> List[str]:
    """Levels of one block, fastest first."""
    return [n for n in ordered_levels(dict(levels)) if block in levels[n].block_indices(cfg.blocks)]


def _renamed(name: str, places: Sequence[int]) -> str:
    parts = name.split(".")
    if parts[0] == "blocks":
        parts[1] = str(places[int(parts[1])])
    return ".".join(parts)


def _open_residual(grown: Dict[str, Tensor], dim: int, seed: int) -> None:
    """New columns of the embedding are zero; those of the head are not, so that gradient comes back through them."""
    grown["embedding.weight"][:, dim:] = 0
    head_VD = grown["head.weight"]
    generator = torch.Generator().manual_seed(seed + 1)
    drawn = torch.empty(head_VD.shape).normal_(0.0, head_VD.size(1) ** -0.5, generator=generator)
    head_VD[:, dim:] = drawn[:, dim:].to(head_VD)


def _overlay(name: str, new: Tensor, old: Tensor, cfg: ModelConfig, new_cfg: ModelConfig) -> None:
    """Put an old parameter into the corner of a new one, scaled as the residual stream asks for."""
    scale = math.sqrt(cfg.dim / new_cfg.dim)
    if name.endswith("mixer.qkv.weight"):
        width = cfg.dim // cfg.heads
        corner = new.view(3, new_cfg.heads, width, new_cfg.dim)[:, : cfg.heads, :, : cfg.dim]
        corner.copy_(scale * old.view(3, cfg.heads, width, cfg.dim))
    elif name.endswith(("up.weight", "head.weight")):
        new[: old.size(0), : old.size(1)] = scale * old
    elif name.endswith(("down.weight", "mixer.out.weight", "embedding.weight")):
        new[: old.size(0), : old.size(1)] = old / scale
    else:
        new.copy_(old)


def _check(
    cfg: ModelConfig, levels: Levels, state: Mapping[str, Tensor], new_cfg: ModelConfig, new_levels: Levels
) -> None:
    """ValueError unless the target can hold the source."""
    slots = next((name for name in state if is_slot(name)), None)
    if slots is not None:
        raise ValueError(f"{slots!r} belongs to an expert slot; fold the slots and remove them before growing")
    for key in ("mixer", "wiring", "window", "rope_base", "memory"):
        if getattr(new_cfg, key) != getattr(cfg, key):
            raise ValueError(
                f"model.{key}={getattr(new_cfg, key)} cannot be grown into from {getattr(cfg, key)}; keep it"
            )
    for key in ("dim", "blocks", "context"):
        if getattr(new_cfg, key) < getattr(cfg, key):
            raise ValueError(
                f"model.{key}={getattr(new_cfg, key)} must be at least {getattr(cfg, key)}: models only grow"
            )
    if new_cfg.dim != cfg.dim and cfg.mixer != "attention":
        raise ValueError(
            f"model.dim={new_cfg.dim} must stay {cfg.dim} with model.mixer={cfg.mixer}; grow MLPs or blocks"
        )
    if new_cfg.dim * cfg.heads != cfg.dim * new_cfg.heads:
        raise ValueError(
            f"model.heads={new_cfg.heads} changes the width of a head; with model.dim={new_cfg.dim} it must be a "
            f"multiple of {cfg.dim // cfg.heads} wide: use heads={new_cfg.dim * cfg.heads // cfg.dim}"
        )
    for name, level in levels.items():
        if name not in new_levels:
            raise ValueError(f"levels.{name} is missing in the larger model; models only grow")
        if new_levels[name].width < level.width:
            raise ValueError(f"levels.{name}.width={new_levels[name].width} must be at least {level.width}")
    order = [name for name in ordered_levels(dict(new_levels)) if name in levels]
    if order != ordered_levels(dict(levels)):
        raise ValueError(f"levels: the periods order them as {', '.join(order)}, which is not how they were; keep it")


def _check_places(
    places: Sequence[int], cfg: ModelConfig, levels: Levels, new_cfg: ModelConfig, new_levels: Levels
) -> None:
    """ValueError unless old blocks keep their order and find their levels."""
    ascending = all(a < b for a, b in zip((-1, *places), (*places, new_cfg.blocks), strict=True))
    if len(places) != cfg.blocks or not ascending:
        raise ValueError(f"places={tuple(places)} must be {cfg.blocks} ascending block numbers below {new_cfg.blocks}")
    for block, place in enumerate(places):
        for name in _names_at(levels, cfg, block):
            if name not in _names_at(new_levels, new_cfg, place):
                raise ValueError(
                    f"places: level {name} of block {block} does not sit in block {place} of the larger model"
                )
