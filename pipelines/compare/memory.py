"""What a method may keep of the stream: sequences (and what it stores beside them) within a number of bytes.

Shapes: N stored sequences, B drawn ones, S tokens per sequence, K log-probabilities kept per token.
"""

from __future__ import annotations

from typing import Optional, Tuple

import numpy as np

TOP_BYTES = 4
"""Bytes of one kept log-probability: a float16 and an id of two bytes."""


class Memory:
    """A reservoir over everything offered, the same for every method: each sequence seen stays with equal chance.

    Args:
        capacity: bytes; infinite keeps everything.
        extra: bytes stored per token beside its own one.
        seed: of the reservoir and of draws.
    """

    def __init__(self, capacity: float, extra: int, seed: int) -> None:
        self.capacity, self.extra = capacity, extra
        self.random = np.random.default_rng([seed, 77])
        self.tokens_NS: np.ndarray = np.empty((0, 0), np.int64)
        self.sources_N: np.ndarray = np.empty(0, np.int64)
        self.ids_NTK: Optional[np.ndarray] = None
        self.logs_NTK: Optional[np.ndarray] = None
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
    ) -> None:
        """Offer sequences in order (reservoir sampling, algorithm R). `kept`: ids and log-probabilities (N, T, K)."""
        if not len(tokens_NS):
            return
        limit = self.rows(tokens_NS.shape[1], share)
        room = max(0, min(limit - len(self), len(tokens_NS)))
        self._append(tokens_NS[:room], sources_N[:room], None if kept is None else (kept[0][:room], kept[1][:room]))
        self.seen += room
        for i in range(room, len(tokens_NS)):
            self.seen += 1
            place = int(self.random.integers(self.seen))
            if place < len(self):
                self.tokens_NS[place], self.sources_N[place] = tokens_NS[i], sources_N[i]
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

    def draw(self, number: int, balance: float = 0.0) -> np.ndarray:
        """Indices (B,) of stored sequences, drawn with replacement.

        balance: 0 draws every sequence with equal chance, 1 every source, in between a power of the source's share.
        """
        if not number:
            return np.empty(0, np.int64)
        if not balance:
            return self.random.integers(len(self), size=number)
        counts = np.bincount(self.sources_N)
        weights = counts[self.sources_N] ** -float(balance)
        return self.random.choice(len(self), size=number, p=weights / weights.sum())
