"""The clock of the levels: a pure function from stream positions to the levels that are due."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Tuple

from nl_model.config import LevelConfig, ordered_levels


@dataclass(frozen=True)
class LevelClock:
    """Which levels are due when the stream moves on. Positions count tokens from the start of the stream.

    A level with period C is due at every positive multiple of C and constant in between (Eq. 71).
    """

    periods: Dict[str, int]

    @classmethod
    def of(cls, levels: Dict[str, LevelConfig], owner: str | None = None, step_tokens: int = 1) -> LevelClock:
        """Clock over all levels, or over those of one owner, fastest first.

        Args:
            step_tokens: tokens of one learner step; what the period of a level in steps is multiplied with.
        """
        names = [name for name in ordered_levels(levels) if owner is None or levels[name].owner == owner]
        unit = {"tokens": 1, "steps": step_tokens}
        return cls({name: levels[name].period * unit[levels[name].unit] for name in names})

    def due(self, before: int, after: int) -> Tuple[str, ...]:
        """Names of the levels that have a boundary in (before, after], fastest first."""
        assert 0 <= before <= after, f"the clock runs forward: {before} to {after}"
        return tuple(name for name, period in self.periods.items() if after // period > before // period)

    def on_boundary(self, tokens: int) -> bool:
        """Whether every level of this clock is at a boundary (position 0 counts)."""
        return all(tokens % period == 0 for period in self.periods.values())


def written_share(sizes: Dict[str, int], periods: Dict[str, int]) -> float:
    """Share of the parameters that is rewritten per token on average: (sum_l P_l / C_l) / sum_l P_l."""
    return sum(size / periods[name] for name, size in sizes.items()) / sum(sizes.values())
