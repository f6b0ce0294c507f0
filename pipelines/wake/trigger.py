"""When to sleep: policies that look at every wake step, and the change-point detector among them.

The learner holds the trigger and keeps its state in its checkpoints: replayed steps come to the same decisions.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any, Callable, Dict, Mapping, Optional

import torch
from torch import Tensor

from nl_model.clock import LevelClock
from pipelines.config.when import WhenConfig


@dataclass(frozen=True)
class Cause:
    """Why a round is due."""

    policy: str
    text: str
    figures: Dict[str, float]

    def to_json(self) -> Dict[str, Any]:
        """As a JSON-able mapping."""
        return asdict(self)


@dataclass
class Drift:
    """One-sided CUSUM (Page, 1954) over standardised losses: S_t = max(0, S_{t-1} + z_t - slack), a change where
    S_t > threshold. Mean and deviation are running ones (Welford), over the steps since the last change."""

    slack: float
    threshold: float
    warmup: int
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared deviations from the mean."""
    excess: float = 0.0
    """S_t."""

    def observe(self, loss: float) -> bool:
        """Take the next loss; whether it has shifted upwards. Then the detector starts anew."""
        if not math.isfinite(loss):
            return False
        if self.count >= self.warmup:
            deviation = math.sqrt(self.squares / (self.count - 1))
            score = (loss - self.mean) / max(deviation, 1e-6 * max(abs(self.mean), 1.0))
            self.excess = max(0.0, self.excess + score - self.slack)
            if self.excess > self.threshold:
                self.restart()
                return True
        self.count += 1
        delta = loss - self.mean
        self.mean += delta / self.count
        self.squares += delta * (loss - self.mean)
        return False

    def restart(self) -> None:
        """Forget the past."""
        self.count, self.mean, self.squares, self.excess = 0, 0.0, 0.0, 0.0


class Trigger:
    """Decides after every wake step whether a round is due here.

    Args:
        period: of the pool's fastest level, in tokens.
        clock: of the learner's levels; policies other than `tokens` wait for one of their common boundaries.
        now: a clock in seconds.
    """

    def __init__(
        self, cfg: WhenConfig, period: int, clock: LevelClock, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.cfg, self.period, self.clock, self.now = cfg, period, clock, now
        self.drift = Drift(cfg.drift_slack, cfg.drift_threshold, cfg.drift_warmup)
        self.last_mark = 0
        self.since = now()
        self.wanted: Optional[Cause] = None

    def before_step(self, tokens: int, waited: float) -> Optional[Cause]:
        """Called when input has come.

        Args:
            tokens: stream position.
            waited: seconds that the input took to come.
        """
        if "idle" in self.cfg.policies and waited >= self.cfg.idle_seconds:
            self._want("idle", f"no input for {waited:.0f} s", seconds=waited)
        return self._due(tokens)

    def after_step(self, before: int, after: int, loss: float, distance: Callable[[], float]) -> Optional[Cause]:
        """Called when a step has moved the stream position from `before` to `after`.

        Args:
            loss: online loss of the step, measured before learning.
            distance: computes how far the fast weights are from their rest (`relative_distance`).
        """
        policies = self.cfg.policies
        if "tokens" in policies and after // self.period > before // self.period:
            text = f"the pool's period of {self.period:,} tokens has passed"
            return self._mark(after, Cause("tokens", text, {"period": self.period}))
        if "surprise" in policies:
            self._observe(loss)
        passed = self.now() - self.since
        if "time" in policies and passed >= self.cfg.seconds:
            self._want("time", f"{passed:.0f} s have passed", seconds=passed)
        if "saturation" in policies and self.wanted is None and self._ripe(after):
            self._saturated(distance())
        return self._due(after)

    def _saturated(self, moved: float) -> None:
        if moved >= self.cfg.saturation:
            self._want("saturation", f"the fast levels have moved by {moved:.3f} of their rest's norm", distance=moved)

    def _observe(self, loss: float) -> None:
        mean = self.drift.mean
        if self.drift.observe(loss):
            self._want("surprise", f"the online loss has risen from {mean:.3f} to {loss:.3f}", mean=mean, loss=loss)

    def _want(self, policy: str, text: str, **figures: float) -> None:
        if self.wanted is None:
            self.wanted = Cause(policy, text, figures)

    def _ripe(self, tokens: int) -> bool:
        """Whether a round may be pinned here: at a common boundary, and not too soon after the last one."""
        far = tokens - self.last_mark >= max(1, int(self.cfg.least * self.period))
        return far and self.clock.on_boundary(tokens)

    def _due(self, tokens: int) -> Optional[Cause]:
        return self._mark(tokens, self.wanted) if self.wanted is not None and self._ripe(tokens) else None

    def _mark(self, tokens: int, cause: Cause) -> Cause:
        self.last_mark, self.since, self.wanted = tokens, self.now(), None
        return cause

    def state(self) -> Dict[str, Any]:
        """Everything a resume needs, as a JSON-able mapping."""
        drift = {key: getattr(self.drift, key) for key in ("count", "mean", "squares", "excess")}
        wanted = self.wanted.to_json() if self.wanted is not None else None
        passed = self.now() - self.since if "time" in self.cfg.policies else 0.0  # else a checkpoint knows no clock
        return {"last_mark": self.last_mark, "passed": passed, "wanted": wanted, "drift": drift}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        self.last_mark, self.since = int(state["last_mark"]), self.now() - float(state["passed"])
        self.wanted = Cause(**state["wanted"]) if state["wanted"] is not None else None
        for key, value in state["drift"].items():
            setattr(self.drift, key, value)


def relative_distance(weights: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> float:
    """Norm of what some weights differ from their rest state by, relative to the norm of that state."""
    moved = torch.stack([(weights[name] - rest[name].to(weights[name])).double().norm() for name in rest]).norm()
    size = torch.stack([value.double().norm() for value in rest.values()]).norm()
    return float(moved / size.clamp_min(1e-12).to(moved))
