"""How a consolidation round trains: part of the configuration of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from nl_model.config import OptimizerConfig
from pipelines.checks import at_least, one_of, share

SAMPLERS = ("uniform", "recency", "surprise")


@dataclass(frozen=True)
class SleepConfig:
    """One consolidation round."""

    tokens_per_token: float = 0.5
    """Tokens trained on asleep per token streamed awake since the last round."""
    max_steps: int = 0
    """Most steps of one round; 0: no limit."""
    max_queued: int = 4
    """Most rounds that wait for the pool; beyond it the oldest is merged into the next."""
    batch: int = 8
    """Sequences per step over all ranks together."""
    recent: float = 0.5
    """Share of recent experience in a batch; the rest is older experience, replayed."""
    sampler: str = "uniform"
    """How older experience is drawn: uniform, recency, or surprise."""
    half_life: int = 2048
    """Half-life of the recency sampler, in experiences."""
    surprise_cap: float = 3.0
    """Largest weight of one experience in the surprise sampler, in multiples of the mean."""
    source_cap: float = 0.5
    """Largest share of one source among replayed experiences in the surprise sampler."""
    teacher: float = 0.1
    """Weight of distillation from the teacher (the awake model) on recent experience; 0 skips its passes."""
    anchor: float = 0.1
    """Weight of distillation from the anchor (the last promoted model) on old experience; 0 skips its passes."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-3))
    """Optimizer of the pool over all levels of the student; lr is the peak of a warmed-up cosine per round."""
    keep_moments: bool = False
    """Start a round with the optimizer's moments of the round that made its anchor, instead of with none."""

    def __post_init__(self) -> None:
        at_least("sleep.tokens_per_token", self.tokens_per_token, 0)
        at_least("sleep.max_steps", self.max_steps, 0)
        at_least("sleep.max_queued", self.max_queued, 1)
        at_least("sleep.batch", self.batch, 1)
        share("sleep.recent", self.recent)
        one_of("sleep.sampler", self.sampler, SAMPLERS)
        at_least("sleep.half_life", self.half_life, 1)
        at_least("sleep.surprise_cap", self.surprise_cap, 1)
        share("sleep.source_cap", self.source_cap)
        share("sleep.teacher", self.teacher)
        share("sleep.anchor", self.anchor)
        # ZeRO hands an optimizer flat shards; one that looks at whole matrices cannot work with them.
        one_of("sleep.optimizer.name", self.optimizer.name, ("adamw", "sgd"))
