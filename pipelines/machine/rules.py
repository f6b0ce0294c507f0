"""What the machine knows of the configuration: all of it that decides, nothing that only a driver needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Tuple

from pipelines.config.gate import GateConfig
from pipelines.config.schema import Config, FailureConfig
from pipelines.config.sleep import SleepConfig

CHUNK = 8
"""Wake steps per call of the learner: few enough that a report comes often, many enough that calls cost nothing."""


def least_rest(period: int) -> int:
    """Tokens that a stream's end must bring for a last round; what is less may wait for the next run."""
    return max(1, period // 10)


@dataclass(frozen=True)
class Rules:
    """Constants of a run."""

    period: int
    """Of the pool's fastest level, in tokens: how far the learner may run ahead of a mark where `deterministic`."""
    step_tokens: int
    """Tokens of a wake step."""
    sources: Tuple[str, ...]
    """Sources that are probed, in order."""
    base_sources: Tuple[str, ...] = ()
    """Those of the base: seen from the start."""
    wake_flops: float = 0.0
    """FLOPs of the awake phase per stream token."""
    seed: int = 0
    deterministic: bool = False
    """Adoptions have fixed places in the stream: the learner waits for the pool where it must."""
    behind: float = 1.0
    """Periods between a mark and that place."""
    sleep: SleepConfig = field(default_factory=SleepConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    failures: FailureConfig = field(default_factory=FailureConfig)
    ranks: int = 1
    zero_stage: int = 0
    release_after_round: bool = False
    """Give the pool's place back after every round."""
    control: bool = False
    """Train controls when the stream has ended."""

    @property
    def lag(self) -> int:
        """Tokens between a mark and the place where its release is adopted, where `deterministic`."""
        return round(self.behind * self.period)

    @property
    def depth(self) -> int:
        """Calls of the learner in flight: two hide the way there and back; one makes each a function of the last."""
        return 1 if self.deterministic else 2

    @classmethod
    def of(
        cls, cfg: Config, sources: Tuple[str, ...], base_sources: Tuple[str, ...] = (), wake_flops: float = 0.0
    ) -> Rules:
        """The rules of a configuration."""
        return cls(
            period=cfg.pool_period,
            step_tokens=cfg.wake.batch * cfg.model.context,
            sources=sources,
            base_sources=base_sources,
            wake_flops=wake_flops,
            seed=cfg.run.seed,
            deterministic=cfg.run.deterministic,
            behind=cfg.run.lag,
            sleep=cfg.sleep,
            gate=cfg.gate,
            failures=cfg.failures,
            ranks=cfg.pool.ranks,
            zero_stage=cfg.pool.zero_stage,
            release_after_round=cfg.pool.release_after_round,
            control=cfg.trains_controls,
        )
