"""The base: what a run starts from when no checkpoint is given, pretrained on a mixture of its first sources."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Callable, Dict, List, Tuple

import numpy as np
import torch
from torch import Tensor

from nl_model.config import OptimizerConfig, ordered_levels
from nl_model.losses import token_nll
from nl_model.model import NestedLM
from pipelines.config.load import config_hash
from pipelines.config.schema import Config
from pipelines.data.corpus import Corpus
from pipelines.data.stream import Sequence, Stream
from pipelines.data.tokens import Tokenizer
from pipelines.experience import Record
from pipelines.sleep.schedule import Schedule
from pipelines.sleep.training import ALONE, Batch, Place


def base_sequences(corpus: Corpus, tokenizer: Tokenizer, cfg: Config, sources: List[str]) -> List[Sequence]:
    """All sequences of the base sources, mixed; the same for the same corpus and configuration.

    None where a checkpoint comes without base sources: what it was trained on is then not at hand.
    """
    if cfg.base.checkpoint is not None and not sources:
        return []
    mixed = replace(cfg.stream, schedule="mixed", sources=[], max_source_bytes=cfg.base_source_bytes)
    stream = Stream(corpus, tokenizer, mixed, cfg.model.context, sources, cfg.run.seed)
    sequences: List[Sequence] = []
    while batch := stream.next_batch(1):
        sequences.extend(batch)
    if not sequences:
        raise ValueError(f"base.sources={sources} hold less than one sequence of {cfg.model.context} tokens")
    return sequences


def base_records(sequences: List[Sequence]) -> List[Record]:
    """The base mixture as experiences with keys -1, -2, ...: history that sleep may replay."""
    return [
        Record(
            key=-1 - i,
            source=s.source,
            document=s.document,
            offset=s.offset,
            subject=s.subject,
            kind="base",
            surprise=0.0,
            fast_step=0,
            release=0,
            tokens=s.tokens,
        )
        for i, s in enumerate(sequences)
    ]


def base_hash(cfg: Config, sources: List[str], sequences: List[Sequence]) -> str:
    """Name of a base in the cache: a hash of all that decides it, the text itself included."""
    text = hashlib.sha256(b"".join(s.tokens.tobytes() for s in sequences)).hexdigest()
    shape = {
        "model": asdict(cfg.model),
        "levels": [
            [n, cfg.levels[n].width, cfg.levels[n].blocks, cfg.levels[n].owner] for n in ordered_levels(cfg.levels)
        ],
    }
    how = [asdict(cfg.base), asdict(cfg.tokenizer), cfg.run.seed, cfg.pool.ranks, cfg.compute.precision]
    return config_hash(shape, how, sources, text)


class BaseBatches:
    """Batches of base pretraining: seeded passes over the mixture, a pure function of the step."""

    def __init__(self, sequences: List[Sequence], batch: int, seed: int) -> None:
        self.tokens = np.stack([s.tokens for s in sequences])
        self.size, self.seed = batch, seed

    def keys(self, step: int, place: Place = ALONE) -> np.ndarray:
        """Numbers of the sequences of one rank's share of a step: int64 (B / world,)."""
        positions = np.arange(step * self.size, (step + 1) * self.size)
        epochs, places = np.divmod(positions, len(self.tokens))
        orders = {e: np.random.default_rng([self.seed, int(e)]).permutation(len(self.tokens)) for e in set(epochs)}
        rows = np.array([orders[e][p] for e, p in zip(epochs, places, strict=True)])
        return rows[place.rank :: place.world]

    def batch(self, step: int, place: Place = ALONE) -> Batch:
        """One rank's share of a step; all of it counts as recent."""
        rows = self.keys(step, place)
        tokens_BS = torch.from_numpy(self.tokens[rows].astype(np.int64))
        return Batch(tokens_BS, torch.ones(len(rows), dtype=torch.bool), rows)


class TrueTokens:
    """The objective of plain training: the loss of the text."""

    def loss(self, step: int, forward: Callable[[Tensor], Tensor], batch: Batch) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Mean loss in nats per token."""
        return token_nll(forward(batch.tokens_BS[:, :-1]), batch.tokens_BS[:, 1:]).mean(), {}


def base_steps(cfg: Config) -> int:
    """Steps of base pretraining, whatever the pool's size."""
    return cfg.base.tokens // (cfg.base.batch * cfg.model.context)


@dataclass(frozen=True)
class Pretraining:
    """What base pretraining is made of, beside the model and the engine: the same wherever it runs."""

    batches: BaseBatches
    batch: int
    """Sequences per step over all ranks."""
    schedule: Schedule
    optimizer: OptimizerConfig
    frozen: List[str]
    """Parameters that stay as they are: the learner's levels, which are neutral until it writes them."""

    @classmethod
    def of(cls, cfg: Config, sequences: List[Sequence], model: NestedLM) -> Pretraining:
        """Pretraining as configured, over a mixture."""
        schedule = Schedule("cosine", cfg.base.lr, base_steps(cfg))
        batches = BaseBatches(sequences, cfg.base.batch, cfg.run.seed)
        return cls(batches, cfg.base.batch, schedule, OptimizerConfig(lr=cfg.base.lr), model.owned_by("learner"))
