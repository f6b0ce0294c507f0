"""Value objects of the model: its shape, its levels and their optimizers. Validated when built."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Dict, List, Optional, Sequence, Tuple

from nl_model.checks import above, at_least, one_of, within
from nl_model.memory.config import MemoryConfig

OWNERS = ("learner", "pool")
REDUCTIONS = ("mean", "sum")
MIXERS = ("attention", "titans")
WIRINGS = ("sequential", "nested", "independent")
UNITS = ("tokens", "steps")
OPTIMIZERS = ("adamw", "sgd", "muon", "dgd", "delta_momentum", "deep_momentum", "m3")
"""Names of the registry in `nl_model.optim`, whose docstring says what each does and which settings it reads."""
MEMORIES = ("linear", "mlp")
OBJECTIVES = ("dot", "l2")
OUTPUTS = ("identity", "newton_schulz")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
"""What `nl_model.distillation` measures a student by."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How one level writes: every level has an optimizer and a step counter of its own."""

    name: str = "adamw"
    """adamw, sgd, muon, dgd, delta_momentum, deep_momentum or m3."""
    lr: float = 1e-3
    """Step size of one write; 0 writes nothing."""
    beta1: float = 0.9
    """Decay of the first moment or momentum, counted in this level's own writes."""
    beta2: float = 0.95
    """Decay of the second moment, counted in this level's own writes."""
    eps: float = 1e-8
    """Added to the root of the second moment; may be 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay per write."""
    clip: float = 1.0
    """Largest gradient norm of this level per write; 0 switches clipping off."""
    reduction: str = "mean"
    """mean: the write uses the mean of the per-token gradients of its period; sum: their sum (Eq. 71 to the letter)."""
    beta3: float = 0.9
    """m3: decay of the slow momentum, counted in its own periods."""
    nesterov: bool = False
    """muon: look one step of momentum ahead."""
    ns_steps: int = 5
    """muon, deep_momentum, m3: Newton-Schulz steps per orthogonalisation."""
    adamw_scale: float = 0.1
    """muon, deep_momentum, m3: step size of what AdamW writes (vectors, embedding, head), in multiples of lr."""
    erase: float = 1.0
    """dgd, delta_momentum, deep_momentum with l2: strength of the erase term; 0 is plain descent or momentum."""
    slow_period: int = 8
    """m3: writes between two updates of the slow momentum."""
    slow_weight: float = 0.5
    """m3: weight of the slow momentum's direction beside the fast one's."""
    memory: str = "mlp"
    """deep_momentum: linear or mlp."""
    objective: str = "l2"
    """deep_momentum: what its memory minimises, dot or l2."""
    output: str = "newton_schulz"
    """deep_momentum: what its memory's output passes through, identity or newton_schulz."""
    literal: bool = False
    """delta_momentum, m3: the form printed in the paper, which is not scale-invariant and can diverge."""

    def __post_init__(self) -> None:
        choices = {"name": OPTIMIZERS, "reduction": REDUCTIONS}
        choices |= {"memory": MEMORIES, "objective": OBJECTIVES, "output": OUTPUTS}
        for key, known in choices.items():
            one_of(f"optimizer.{key}", getattr(self, key), known)
        for key in ("lr", "eps", "weight_decay", "adamw_scale", "slow_weight", "clip"):
            at_least(f"optimizer.{key}", getattr(self, key), 0)
        for key in ("beta1", "beta2", "beta3"):
            within(f"optimizer.{key}", getattr(self, key), 0, 1, "[)")
        within("optimizer.erase", self.erase, 0, 1)
        for key in ("ns_steps", "slow_period"):
            at_least(f"optimizer.{key}", getattr(self, key), 1)


@dataclass(frozen=True)
class LevelConfig:
    """A named group of MLPs that share one update period (continuum memory system, Eq. 70 and 71)."""

    period: int = 2048
    """How long the level stays constant, in the unit below."""
    unit: str = "tokens"
    """tokens of the stream, or steps of the learner (one step is one batch)."""
    width: int = 256
    """Hidden units of the level's MLP in each block it sits in."""
    blocks: str = "last_quarter"
    """Where it sits: all, last_quarter, last_half, or block numbers such as "2,3"."""
    owner: str = "learner"
    """learner: written awake, online. pool: written asleep, by the consolidation pool only."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The level's own optimizer (used by its owner)."""

    def __post_init__(self) -> None:
        at_least("period", self.period, 1)
        one_of("unit", self.unit, UNITS)
        at_least("width", self.width, 1)
        one_of("owner", self.owner, OWNERS)

    def block_indices(self, num_blocks: int) -> Tuple[int, ...]:
        """Numbers of the blocks this level sits in, ascending."""
        named = {"all": 0, "last_half": num_blocks - max(1, num_blocks // 2)}
        named["last_quarter"] = num_blocks - max(1, num_blocks // 4)
        if self.blocks in named:
            return tuple(range(named[self.blocks], num_blocks))
        try:
            indices = sorted({int(part) for part in self.blocks.split(",")})
        except ValueError:
            raise ValueError(
                f"blocks={self.blocks!r} is neither one of {', '.join(named)} nor block numbers such as '2,3'"
            ) from None
        if indices[0] < 0 or indices[-1] >= num_blocks:
            raise ValueError(f"blocks={self.blocks!r} names a block outside 0..{num_blocks - 1}")
        return tuple(indices)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a NestedLM. The vocabulary size comes from the tokenizer."""

    dim: int = 96
    """Width of the residual stream."""
    blocks: int = 4
    """Number of decoder blocks."""
    heads: int = 3
    """Attention heads per block."""
    context: int = 128
    """Tokens per sequence."""
    mixer: str = "attention"
    """What mixes tokens in a block: attention (softmax, rotary) or titans (self-modifying memories, the Hope block)."""
    window: int = 0
    """Tokens that attention sees back, the present one included; 0 means all of them."""
    wiring: str = "sequential"
    """How the levels of a block are joined: sequential (a chain, starts learned together), nested (a chain; each level
    learns the start of the next faster one, which returns to it), independent (side by side, learned weights)."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """The memories of the titans mixer."""
    rope_base: float = 10_000.0
    """Base of the rotary position frequencies."""

    def __post_init__(self) -> None:
        for key in ("dim", "blocks", "heads", "context"):
            at_least(f"model.{key}", getattr(self, key), 1)
        at_least("model.window", self.window, 0)
        above("model.rope_base", self.rope_base, 0)
        for key, names in (("mixer", MIXERS), ("wiring", WIRINGS)):
            one_of(f"model.{key}", getattr(self, key), names)
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(
                f"model.dim={self.dim} must be an even multiple of model.heads={self.heads} "
                "(rotary attention rotates pairs within a head)"
            )


def in_tokens(levels: Dict[str, LevelConfig], step_tokens: int) -> Dict[str, LevelConfig]:
    """The same levels with every period counted in tokens, where one step of the learner has `step_tokens`."""
    return {
        name: replace(level, period=level.period * step_tokens, unit="tokens") if level.unit == "steps" else level
        for name, level in levels.items()
    }


def ordered_levels(levels: Dict[str, LevelConfig]) -> List[str]:
    """Level names from the fastest to the slowest; ties keep the order of the configuration."""
    return sorted(levels, key=lambda name: levels[name].period)


def named_levels(levels: Dict[str, LevelConfig], names: Optional[Sequence[str]]) -> List[str]:
    """Some levels by name (all for None), fastest first; ValueError for none, a bare string, or unknown names."""
    if names is None:
        return ordered_levels(levels)
    if isinstance(names, str) or not names or any(name not in levels for name in names):
        raise ValueError(f"names={names!r} must list levels of the model; it has {', '.join(ordered_levels(levels))}")
    return [name for name in ordered_levels(levels) if name in names]


def check_levels(levels: Dict[str, LevelConfig], num_blocks: int) -> None:
    """Raise ValueError unless the levels form a proper hierarchy (periods nested, learner faster than pool)."""
    if not any(level.owner == "pool" for level in levels.values()):
        raise ValueError("levels: no level has owner=pool; the consolidation pool would have nothing to write")
    if not any(level.owner == "learner" for level in levels.values()):
        raise ValueError("levels: no level has owner=learner; the online learner would have nothing to write")
    names = ordered_levels(levels)
    units = {level.unit for level in levels.values()}
    if len(units) > 1:
        raise ValueError("levels: some periods count tokens and others steps; use one unit for all levels")
    for name in names:
        if not (name.isidentifier() and name.isascii()):
            raise ValueError(f"levels: {name!r} is no name for a level; use letters, digits and underscores")
        try:
            levels[name].block_indices(num_blocks)
        except ValueError as error:
            raise ValueError(f"levels.{name}: {error}") from None
    for faster, slower in itertools.pairwise(names):
        fast, slow = levels[faster], levels[slower]
        if slow.period % fast.period:
            raise ValueError(
                f"levels.{slower}.period={slow.period} is not a multiple of levels.{faster}.period={fast.period}; "
                f"use {slow.period // fast.period * fast.period or fast.period} or another multiple"
            )
        if fast.owner == "pool" and slow.owner == "learner":
            raise ValueError(
                f"levels.{slower} (period {slow.period}) is written by the learner but is slower than levels.{faster} "
                f"(period {fast.period}), which the pool writes; levels of the learner must be the faster ones"
            )
