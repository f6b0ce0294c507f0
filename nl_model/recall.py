"""Recall: what followed the same words last time, read beside a model's own prediction.

The fastest memory of all, without parameters that gradients train: for contexts of some lengths it holds the token
that came next when they were last found, and how often in a row it was that one. Reading goes from the shortest
context to the longest: with probability w the next token is the one remembered, else what was predicted so far
(prediction by partial matching, Cleary and Witten 1984, over a model in place of an empty context). The weights w are
learned as they are used, by online expectation maximisation, one for each length, number of times in a row, and
likelihood of that token before.

Bounded in memory and time: hash tables of fixed size in which later text takes the place of earlier text. What they
hold is a function of the text found, in its order; how that was cut into calls does not matter.

Shapes: B sequences, S tokens, T = S - 1 predicted tokens, K lengths of context, N slots, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Tuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LENGTHS = (1, 2, 3, 4, 6, 10, 16)
"""Tokens of context."""
RUNS = 3
"""Times in a row that a token followed its context from which on they are not told apart."""
BINS = 12
"""Classes of how likely a remembered token was before, one per unit of its log-odds, the outer ones open."""
FIRST = 0.3
"""Every w at first."""
RATE = 0.02
"""What one token moves its w by."""
MOST_SLOTS = 1 << 32
"""Slots that its hashes can tell apart."""
LEAST, MOST = 1e-4, 1.0 - 1e-4
"""Bounds of every w: no token ever becomes impossible."""
ROWS = 256
"""Sequences that `remember` reads at a time: what it needs for them in between is a hundred times their text."""
TOKEN_BITS, RUN_BITS = 24, 8
"""Of a slot's 64 bits; the others check that it is that context's."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Predictions:
    """What was remembered of some sequences before they were found."""

    tokens_BKT: Ints
    """The token that followed each context last time; 0 where there is none."""
    runs_BKT: Ints
    """How often in a row, at most `RUNS`; of a sequence in which the context stands more than once only its last time
    counts. 0: nothing is remembered."""


class Recall:
    """Remembers what followed.

    Args:
        slots: contexts per length, a power of two. 8 bytes each.
    """

    def __init__(self, slots: int) -> None:
        if not 1 <= slots <= MOST_SLOTS or slots & (slots - 1):
            fitting = min(MOST_SLOTS, 1 << max(1, slots).bit_length() - 1)
            raise ValueError(f"recall has {slots} slots; it takes a power of two up to {MOST_SLOTS}, such as {fitting}")
        self.slots = slots
        self.table_KN = np.zeros((len(LENGTHS), slots), np.int64)
        self.weights = np.full((len(LENGTHS), RUNS + 1, BINS), FIRST)
        """w by length, times in a row, and class of likelihood."""

    @property
    def bytes(self) -> int:
        """Bytes of its tables."""
        return self.table_KN.nbytes

    def observe(self, sequences_BS: npt.NDArray[np.integer]) -> Predictions:
        """Say what is remembered before each token of the sequences, and remember them, one after the other.

        A sequence knows of those before it in the same call, not of its own beginning: that is what attention is for.
        ValueError for tokens that do not fit.
        """
        text_BS: Ints = sequences_BS.astype(np.int64)
        if text_BS.size and not 0 <= text_BS.min() <= text_BS.max() < 1 << TOKEN_BITS:
            most = (1 << TOKEN_BITS) - 1
            raise ValueError(f"recall holds tokens from 0 to {most}, this text has {text_BS.min()} to {text_BS.max()}")
        slots_BKT, checks_BKT = self._places(text_BS)
        tokens, runs = np.zeros_like(slots_BKT), np.zeros_like(slots_BKT)
        lengths_K1 = np.arange(len(LENGTHS))[:, None]
        whole_KT = np.arange(text_BS.shape[1] - 1) >= np.array(LENGTHS)[:, None] - 1
        for row, (slots_KT, checks_KT, next_T) in enumerate(zip(slots_BKT, checks_BKT, text_BS[:, 1:], strict=True)):
            found_KT = self.table_KN[lengths_K1, slots_KT]
            known_KT = (found_KT >> (TOKEN_BITS + RUN_BITS) == checks_KT) & (found_KT > 0) & whole_KT
            tokens[row] = np.where(known_KT, found_KT >> RUN_BITS & (1 << TOKEN_BITS) - 1, 0)
            runs[row] = np.where(known_KT, found_KT & (1 << RUN_BITS) - 1, 0)
            again_KT = np.where(known_KT & (tokens[row] == next_T), np.minimum(runs[row], RUNS - 1), 0) + 1
            kept_KT = checks_KT << TOKEN_BITS + RUN_BITS | next_T << RUN_BITS | again_KT
            where_KT = np.broadcast_to(lengths_K1, whole_KT.shape)[whole_KT], slots_KT[whole_KT]
            self.table_KN[where_KT] = kept_KT[whole_KT]  # of equal places the last one stays
        return Predictions(tokens, runs)

    def remember(self, sequences_BS: npt.NDArray[np.integer]) -> None:
        """Hear sequences, however many, without saying what was remembered before them."""
        for first in range(0, len(sequences_BS), ROWS):
            self.observe(sequences_BS[first : first + ROWS])

    def read(self, sequences_BS: npt.NDArray[np.integer], logits_BTV: Tensor, nll_BT: Tensor) -> Floats:
        """Loss of sequences read together with recall, which remembers them by that: nats (B, T).

        Args:
            logits_BTV: the model's, on its device; what is found is looked up while that still computes.
            nll_BT: its loss.
        """
        found, targets_BT = self.observe(sequences_BS), sequences_BS[:, 1:].astype(np.int64)
        others_BKT = loss_of_remembered(
            logits_BTV.detach(),
            nll_BT.detach(),
            *(torch.from_numpy(part).to(logits_BTV.device) for part in (targets_BT, found.tokens_BKT)),
        )
        own, others = (part.detach().double().cpu().numpy() for part in (nll_BT, others_BKT))
        return self.mix(found, own, others, targets_BT)

    def mix(self, found: Predictions, nll_BT: Floats, nll_BKT: Floats, targets_BT: Ints) -> Floats:
        """Loss of the targets when a model is read together with what was found: nats (B, T).

        The weights learn from it, once for all of the call. Sequences of which the model has no finite loss have none
        here either, and teach nothing.

        Args:
            nll_BT: the model's loss of the targets.
            nll_BKT: its loss of the remembered tokens (`loss_of_remembered`).
        """
        sound_B = np.isfinite(nll_BT).all(1)
        mixed_BT = np.full(nll_BT.shape, np.nan)
        if not sound_B.any():
            return mixed_BT
        tokens_KBT, runs_KBT = (part[sound_B].swapaxes(0, 1) for part in (found.tokens_BKT, found.runs_BKT))
        p_BT, q_KBT = np.exp(-nll_BT[sound_B].astype(float)), np.exp(-nll_BKT[sound_B].astype(float).swapaxes(0, 1))
        hits_KBT = tokens_KBT == targets_BT[sound_B]
        taught: List[Tuple[Ints, Floats]] = []
        for k in range(len(LENGTHS)):
            known_BT, class_BT = runs_KBT[k] > 0, _class_of(q_KBT[k])
            w_BT = np.where(known_BT, self.weights[k, runs_KBT[k], class_BT], 0.0)
            p_BT = (1.0 - w_BT) * p_BT + w_BT * hits_KBT[k]
            later = slice(k + 1, None)
            q_KBT[later] = (1.0 - w_BT) * q_KBT[later] + w_BT * (tokens_KBT[later] == tokens_KBT[k])
            places_BT = (k * (RUNS + 1) + runs_KBT[k]) * BINS + class_BT
            share_BT = np.where(hits_KBT[k], w_BT / np.maximum(p_BT, np.finfo(float).tiny), 0.0)
            taught.append((places_BT[known_BT], share_BT[known_BT]))
        self._learn(*(np.concatenate(part) for part in zip(*taught, strict=True)))
        mixed_BT[sound_B] = -np.log(np.maximum(p_BT, np.finfo(float).tiny))
        return mixed_BT

    def _learn(self, places_M: Ints, shares_M: Floats) -> None:
        """Move every w towards the mean of what it had a share in."""
        counts = np.bincount(places_M, None, self.weights.size).reshape(self.weights.shape)
        sums = np.bincount(places_M, shares_M, self.weights.size).reshape(self.weights.shape)
        kept = (1.0 - RATE) ** counts
        found = kept * self.weights + (1.0 - kept) * sums / np.maximum(counts, 1)
        self.weights = np.clip(found, LEAST, MOST)

    def _places(self, sequences_BS: Ints) -> Tuple[Ints, Ints]:
        """Slot and check (B, K, T) of the contexts that end at each token but the last."""
        B, T = len(sequences_BS), sequences_BS.shape[1] - 1
        said_BT = sequences_BS[:, :T].astype(np.uint64) + np.uint64(1)
        mixed_BT, found = np.zeros((B, T), np.uint64), []
        for back in range(max(LENGTHS)):
            earlier_BT = np.zeros_like(said_BT)
            earlier_BT[:, back:] = said_BT[:, : max(0, T - back)]
            # Two multiplications and a shift between them, as in splitmix64: neighbours end up far apart.
            mixed_BT = mixed_BT * np.uint64(0x9E3779B97F4A7C15) + earlier_BT
            mixed_BT = (mixed_BT ^ mixed_BT >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9)
            if back + 1 in LENGTHS:
                found.append(mixed_BT)
        mixed_BKT = np.stack(found, 1)
        slots = (mixed_BKT >> np.uint64(32)) % np.uint64(self.slots)
        return slots.astype(np.int64), (mixed_BKT & np.uint64((1 << 31) - 1)).astype(np.int64)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is remembered."""
        return not self.table_KN.any()

    def state(self) -> Dict[str, Tensor]:
        """Weights and tables as tensors; the tables are the live ones: write or copy them before the next call."""
        return {
            "recall/weights": torch.from_numpy(self.weights.copy()),
            "recall/table": torch.from_numpy(self.table_KN),
        }

    def load_state(self, tensors: Dict[str, Tensor]) -> None:
        """Take over what `state` returned; what is not there, or of another shape, is left as it is."""
        weights, table = (tensors.get(f"recall/{name}") for name in ("weights", "table"))
        if weights is not None and weights.shape == self.weights.shape:
            self.weights = weights.cpu().numpy().astype(float)
        if table is not None and table.shape == self.table_KN.shape:
            self.table_KN = table.cpu().numpy().copy()


def _class_of(q: Floats) -> Ints:
    """Class of log-odds of probabilities."""
    q = np.clip(q, 1e-6, 1.0 - 1e-6)
    return np.clip(np.floor(np.log(q / (1.0 - q)) + BINS / 2), 0, BINS - 1).astype(np.int64)


@torch.no_grad()
def loss_of_remembered(logits_BTV: Tensor, nll_BT: Tensor, targets_BT: Tensor, tokens_BKT: Tensor) -> Tensor:
    """A model's loss of other tokens in the targets' places: float32 nats (B, K, T).

    nll_BT: its loss of the targets, which saves another pass over the logits.
    """
    at_BT1 = logits_BTV.gather(-1, targets_BT[..., None]).float()
    others_BTK = logits_BTV.gather(-1, tokens_BKT.mT).float()
    return (nll_BT.float()[..., None] + at_BT1 - others_BTK).mT
