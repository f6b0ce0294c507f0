"""What a method may keep of the stream: sequences (and what it stores beside them) within a number of bytes.

Shapes: N stored sequences, B drawn ones, S tokens per sequence, K log-probabilities kept per token.
"""

from __future__ import annotations

from typing import Optional, Sequence, Tuple

import numpy as np

TOP_BYTES = 4
"""Bytes of one kept log-probability: a float16 and an id of two bytes."""


class Memory:
    """A reservoir over everything offered, the same for every method: each sequence seen stays with equal chance.

    Args:
        capacity: bytes; infinite keeps everything.
        extra: bytes stored per token beside its own one.
        seed: of the reservoir and of draws.
        fewest: draw what was drawn the fewest times of its source, instead of with replacement, as long as most of what
            was seen is held; what is left of a longer past is drawn many times in any case.
    """

    def __init__(self, capacity: float, extra: int, seed: int, fewest: bool = False) -> None:
        self.capacity, self.extra, self.fewest = capacity, extra, fewest
        self.random = np.random.default_rng([seed, 77])
        self.tokens_NS: np.ndarray = np.empty((0, 0), np.int64)
        self.sources_N: np.ndarray = np.empty(0, np.int64)
        self.ids_NTK: Optional[np.ndarray] = None
        self.logs_NTK: Optional[np.ndarray] = None
        self.uses_N: np.ndarray = np.empty(0, np.int64)
        """Times that each sequence was drawn; a new one starts where the least drawn one of its source is."""
        self.seen = 0

    def __len__(self) -> int:
        return len(self.tokens_NS)

    def rows(self, width: int, share: float = 1.0) -> int:
        """How many sequences of `width` stored tokens fit into a share of the capacity."""
        room = self.capacity * share / ((width - 1) * (1 + self.extra))
        return 1 << 40 if room == float("inf") else int(room)

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return len(self) * (self.tokens_NS.shape[1] - 1) * (1 + self.extra) if len(self) else 0

    def add(
        self,
        tokens_NS: np.ndarray,
        sources_N: np.ndarray,
        share: float = 1.0,
        kept: Optional[Tuple[np.ndarray, np.ndarray]] = None,
        trained: Sequence[int] = (),
    ) -> None:
        """Offer sequences in order (reservoir sampling, algorithm R).

        Args:
            share: of the capacity that may be filled.
            kept: ids and log-probabilities (N, T, K).
            trained: which of the sequences have been trained on already; they count as drawn once.
        """
        if not len(tokens_NS):
            return
        uses_N = self._least_uses(sources_N)
        uses_N[list(trained)] += 1
        limit = self.rows(tokens_NS.shape[1], share)
        room = max(0, min(limit - len(self), len(tokens_NS)))
        self._append(tokens_NS[:room], sources_N[:room], None if kept is None else (kept[0][:room], kept[1][:room]))
        self.uses_N = np.concatenate([self.uses_N, uses_N[:room]])
        self.seen += room
        for i in range(room, len(tokens_NS)):
            self.seen += 1
            place = int(self.random.integers(self.seen))
            if place < len(self):
                self.tokens_NS[place], self.sources_N[place] = tokens_NS[i], sources_N[i]
                self.uses_N[place] = uses_N[i]
                if kept is not None and self.ids_NTK is not None and self.logs_NTK is not None:
                    self.ids_NTK[place], self.logs_NTK[place] = kept[0][i], kept[1][i]

    def _append(
        self, tokens_NS: np.ndarray, sources_N: np.ndarray, kept: Optional[Tuple[np.ndarray, np.ndarray]]
    ) -> None:
        if not len(tokens_NS):
            return
        if not len(self):
            self.tokens_NS, self.sources_N = tokens_NS.copy(), sources_N.copy()
            if kept is not None:
                self.ids_NTK, self.logs_NTK = kept[0].copy(), kept[1].copy()
            return
        self.tokens_NS = np.concatenate([self.tokens_NS, tokens_NS])
        self.sources_N = np.concatenate([self.sources_N, sources_N])
        if kept is not None and self.ids_NTK is not None and self.logs_NTK is not None:
            self.ids_NTK = np.concatenate([self.ids_NTK, kept[0]])
            self.logs_NTK = np.concatenate([self.logs_NTK, kept[1]])

    def _least_uses(self, sources_N: np.ndarray) -> np.ndarray:
        """Where the count of new sequences begins: behind nobody of their source, so that none is repeated for it."""
        least = {s: self.uses_N[self.sources_N == s].min(initial=1 << 40) for s in np.unique(sources_N).tolist()}
        return np.array([least[s] if least[s] < 1 << 40 else 0 for s in sources_N.tolist()], np.int64)

    def _draw_fewest(self, number: int, balance: float) -> np.ndarray:
        """Sources at random by their weight, of each what was drawn the fewest times."""
        counts = np.bincount(self.sources_N)
        weights = np.where(counts > 0, counts.astype(float) ** (1.0 - balance), 0.0)
        drawn = np.empty(number, np.int64)
        for i, source in enumerate(self.random.choice(len(counts), size=number, p=weights / weights.sum())):
            mine = np.flatnonzero(self.sources_N == source)
            uses = self.uses_N[mine]
            drawn[i] = self.random.choice(mine[uses == uses.min()])
            self.uses_N[drawn[i]] += 1
        return drawn

    def draw(self, number: int, balance: float = 0.0) -> np.ndarray:
        """Indices (B,) of stored sequences.

        balance: 0 draws every sequence with equal chance, 1 every source, in between a power of the source's share.
        """
        if not number:
            return np.empty(0, np.int64)
        if self.fewest and 2 * len(self) >= self.seen:
            return self._draw_fewest(number, balance)
        if not balance:
            return self.random.integers(len(self), size=number)
        counts = np.bincount(self.sources_N)
        weights = counts[self.sources_N] ** -float(balance)
        return self.random.choice(len(self), size=number, p=weights / weights.sum())
