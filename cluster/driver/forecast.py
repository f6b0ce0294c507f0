"""How much memory a run will take, process by process, before anything is started.

Against runs of 0.1 and 13 million parameters, ZeRO 2 and 3, the largest resident sizes came out within a tenth.
"""

from __future__ import annotations

from typing import Dict, Tuple

import psutil
import torch
from rich.table import Table

from nl_model.config import ordered_levels
from nl_model.model import NestedLM, resolve_device
from nl_model.recall import LENGTHS
from pipelines.config.schema import Config
from pipelines.machine.control import at_once

MIB = 1 << 20
FLOAT = 4
"""Bytes of a weight, a gradient and a moment. bf16 is autocast: it changes none of them, and saves a third of the
activations, which the forecast leaves as a reserve."""
INTERPRETERS = {
    "driver": 520,
    "learner": 420,
    "pool rank": 570,
    "control": 420,
    "experience service": 180,
    "tracker": 290,
}
"""MiB of a process in a run with next to no tensors (largest resident size, measured with torch 2.13, DeepSpeed 0.19.8,
Ray 2.60 and MLflow 3.17). Pages of shared libraries count in each of them, so sums are on the safe side."""
RAY_DAEMONS = 450
"""MiB of a Ray node without its dashboard."""
BUCKET = 500_000_000
"""Most gradients that DeepSpeed collects before it sends them (its reduce_bucket_size)."""
LIVE = 1_000_000_000
"""Most parameters that ZeRO 3 keeps gathered (its stage3_max_live_parameters)."""
REMEDIES = {
    "weights": "lower model.dim, model.blocks or levels.*.width",
    "gradients": "lower model.dim, model.blocks or levels.*.width, or raise pool.zero_stage",
    "moments": "lower model.dim or levels.*.width, or raise pool.zero_stage and pool.ranks",
    "master copy": "raise pool.ranks, or lower model.dim or levels.*.width",
    "recall": "lower wake.recall",
    "teacher": "lower model.dim, model.blocks or levels.*.width",
    "anchor": "lower model.dim, model.blocks or levels.*.width",
    "releases": "lower model.dim, model.blocks or levels.*.width",
    "rest and round": "lower model.dim, model.blocks or levels.*.width, or give control.enabled=false",
    "checkpoint": "lower model.dim, model.blocks or levels.*.width, or give control.enabled=false",
    "object store": "lower ray.object_store_mb",
    "interpreter": "use a machine with more memory",
    "daemons": "use a machine with more memory",
}
ACTIVATIONS = {
    "learner": "lower wake.batch or model.context",
    "pool rank": "set pool.micro_batch, lower sleep.batch, base.batch or model.context, or raise pool.ranks",
    "control": "lower wake.batch, sleep.batch or model.context, or give control.enabled=false",
}


def level_sizes(cfg: Config, vocab_size: int) -> Dict[str, int]:
    """Number of parameters per level; no memory is taken for them."""
    with torch.device("meta"):
        return NestedLM(cfg.model, cfg.levels, vocab_size).level_sizes()


def activation_bytes(cfg: Config, vocab_size: int, sequences: int, awake: bool, logits: int = 1) -> int:
    """Bytes that a forward pass over full sequences keeps for its backward pass.

    Args:
        awake: only the learner's levels are trained, so that nothing below the lowest of them is kept.
        logits: tensors of the size of the logits that are alive at once.
    """
    model, levels = cfg.model, cfg.levels
    order = ordered_levels(levels)
    places = {name: levels[name].block_indices(model.blocks) for name in order}
    chain = [(block, name) for block in range(model.blocks) for name in order if block in places[name]]
    first = 0
    if awake:
        first = next(i for i, (_, name) in enumerate(chain) if levels[name].owner == "learner")
    # Around the blocks: the embedding, and what the last norm and the head take in.
    floats = (0 if awake else 3) * model.dim + logits * vocab_size
    for _, name in chain[first:]:
        # A trained MLP keeps both inputs of both of its products, a frozen one only what its norm and its ReLU need.
        copies = 1 if awake and levels[name].owner == "pool" else 2
        floats += copies * (model.dim + levels[name].width)
    attentions = model.blocks - 1 - chain[first][0] if awake else model.blocks
    floats += attentions * (9 if awake else 11) * model.dim
    return FLOAT * floats * sequences * model.context


def passing_bytes(cfg: Config, sequences: int) -> int:
    """Bytes that come and go while the widest block is computed, there and back, and the allocator's slack."""
    width = max(level.width for level in cfg.levels.values())
    return FLOAT * (6 * width + 8 * cfg.model.dim) * sequences * cfg.model.context


def estimate(cfg: Config, vocab_size: int) -> Dict[str, Dict[str, int]]:
    """Bytes of one process of each kind by what they are used for, at its peak.

    Returns:
        {process: {part: bytes}}; `processes` says how many of each there are.
    """
    sizes = level_sizes(cfg, vocab_size)
    total = sum(sizes.values())
    mine = {name: level for name, level in cfg.levels.items() if level.owner == "learner"}
    fast = sum(sizes[name] for name in mine)
    weights, release = FLOAT * total, FLOAT * (total + fast)
    found: Dict[str, Dict[str, int]] = {name: {"interpreter": mib * MIB} for name, mib in INTERPRETERS.items()}
    kept = sum(_moments(level.optimizer.name) * sizes[name] for name, level in mine.items())
    found["learner"] |= {
        "weights": weights + FLOAT * fast,  # and the offset of its levels
        "gradients": FLOAT * fast,
        "moments": FLOAT * kept,
        "recall": 8 * len(LENGTHS) * cfg.wake.recall,
        "activations": activation_bytes(cfg, vocab_size, cfg.wake.batch, True, 3) + passing_bytes(cfg, cfg.wake.batch),
        "releases": release + release // cfg.pool.ranks,  # one being adopted, and the bytes of a shard being checked
    }
    found["pool rank"] |= _rank(cfg, vocab_size, total, release)
    moments, batch = _moments(cfg.sleep.optimizer.name) * weights, max(cfg.wake.batch, cfg.sleep.batch)
    found["control"] |= {
        "weights": weights,
        "gradients": weights,
        "moments": moments,
        "rest and round": 5 * weights,  # the learner's rest and offset; anchor, awake model and candidate
        "releases": 8 * weights,  # base, live, the one before and the mark's, each with an offset
        "checkpoint": 2 * weights + moments,
        "activations": activation_bytes(cfg, vocab_size, batch, False, 3) + passing_bytes(cfg, batch),
    }
    if cfg.ray.address is None:
        found["ray"] = {"daemons": RAY_DAEMONS * MIB, "object store": cfg.ray.object_store_mb * MIB}
    return found


def _moments(optimizer: str) -> int:
    """Numbers that an optimizer keeps per parameter, at most; dgd's are its input statistics, about one."""
    return {"adamw": 2, "m3": 5, "deep_momentum": 3}.get(optimizer, 1)


def _rank(cfg: Config, vocab_size: int, total: int, release: int) -> Dict[str, int]:
    """One rank of the pool, by what its ZeRO stage shards (ZeRO, section 5). The copies of gradients are measured."""
    stage, ranks, weights = cfg.pool.zero_stage, cfg.pool.ranks, FLOAT * total
    share, bucket = -(-weights // ranks), FLOAT * min(total, BUCKET)
    gradients = {0: weights + 2 * bucket, 1: weights + share + 2 * bucket, 2: share + 3 * bucket, 3: 5 * bucket}
    activations = _pass(cfg, vocab_size, -(-cfg.sleep.batch // ranks), 8)
    if cfg.base.checkpoint is None and cfg.base.tokens:
        activations = max(activations, _pass(cfg, vocab_size, -(-cfg.base.batch // ranks), 4))
    smaller = 2 if cfg.pool.bf16_weights else 1
    return {
        "weights": (share + FLOAT * min(total, LIVE) if stage == 3 else weights) // smaller,
        "gradients": gradients[stage] // smaller,
        "moments": _moments(cfg.sleep.optimizer.name) * (share if stage else weights),
        "master copy": share if stage else 0,
        "teacher": weights,
        "anchor": weights,
        "activations": activations,
        "releases": release + 2 * weights,  # the anchor's as read, the candidate as gathered and as scored
    }


def _pass(cfg: Config, vocab_size: int, share: int, logits: int) -> int:
    """Bytes of activations of one pass of a rank over `share` sequences, or over its micro-batch."""
    batch = cfg.pool.micro_batch or share
    kept = activation_bytes(cfg, vocab_size, batch, False, logits)
    if cfg.pool.activation_checkpointing:  # what enters the blocks, and the widest of them as it is run again
        model = cfg.model
        blocks = [
            [lv.width for lv in cfg.levels.values() if i in lv.block_indices(model.blocks)] for i in range(model.blocks)
        ]
        widest = max(11 * model.dim + sum(2 * (model.dim + width) for width in widths) for widths in blocks)
        floats = (model.blocks + 3) * model.dim + logits * vocab_size + widest
        kept = min(kept, FLOAT * floats * batch * model.context)
    return kept + passing_bytes(cfg, batch)


def processes(cfg: Config) -> Dict[str, int]:
    """How many processes of each kind a run has."""
    counts = dict.fromkeys(INTERPRETERS, 1) | {"pool rank": cfg.pool.ranks, "control": at_once(cfg)}
    return counts if cfg.ray.address is not None else counts | {"ray": 1}


def peak_bytes(found: Dict[str, Dict[str, int]], counts: Dict[str, int]) -> int:
    """Most bytes at once: the controls run when the learner and the pool are gone."""
    each = {name: counts[name] * sum(parts.values()) for name, parts in found.items()}
    phases = each["learner"] + each["pool rank"], each["control"]
    return sum(each.values()) - sum(phases) + max(phases)


def memory() -> Tuple[int, int]:
    """Bytes of memory of this machine: (in all, available)."""
    state = psutil.virtual_memory()
    return int(state.total), int(state.available)


def check(cfg: Config, found: Dict[str, Dict[str, int]], total: int) -> None:
    """Raise ValueError where one process alone needs more than `total` bytes."""
    for name, parts in found.items():
        need = sum(parts.values())
        if need > total and processes(cfg)[name]:
            part = max(parts, key=lambda key: parts[key])
            remedy = ACTIVATIONS[name] if part == "activations" else REMEDIES[part]
            raise ValueError(
                f"memory: one {name} process needs about {_size(need)}, this machine has {_size(total)} in all; the "
                f"largest part is {part} with {_size(parts[part])}: {remedy}"
            )


def forecast(cfg: Config, vocab_size: int) -> Table:
    """The estimate as a table, against this machine's memory.

    Raises:
        ValueError: a single process would need more memory than this machine has, naming the largest part and the key
            to lower. Not checked where ray.address names another cluster, or where the tensors go to GPUs.
    """
    found, counts = estimate(cfg, vocab_size), processes(cfg)
    total, available = memory()
    gpu = resolve_device(cfg.compute.device).type == "cuda"
    if cfg.ray.address is None and not gpu:
        check(cfg, found, total)
    peak = peak_bytes(found, counts)
    table = Table(title="memory forecast", title_justify="left", caption_justify="left")
    table.add_column("process")
    for heading in ("number", "each", "together"):
        table.add_column(heading, justify="right")
    table.add_column("of which")
    for name, parts in found.items():
        each = sum(parts.values())
        largest = sorted((part for part in parts if parts[part] >= MIB), key=lambda part: -parts[part])[:3]
        shares = ", ".join(f"{part} {_size(parts[part])}" for part in largest)
        table.add_row(name, str(counts[name]), _size(each), _size(counts[name] * each), shares)
    caption = f"at most {_size(peak)} at once; this machine has {_size(total)}, {_size(available)} of it available"
    if gpu:
        caption += "; all but the interpreters' share lies in GPU memory"
    elif cfg.ray.address is None and peak > available:
        caption += " (less than the run may need: close other programs, or lower what is largest)"
    table.caption = caption
    return table


def _size(count: int) -> str:
    """Bytes for people."""
    return f"{count / MIB:,.0f} MiB" if count < 10 * 1024 * MIB else f"{count / MIB / 1024:,.1f} GiB"
