"""What the gate judges: plain figures and facts about a candidate, gathered by whoever trained and stored it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Dict, Iterable, List, Mapping, Protocol, Sequence, Tuple

import torch
from torch import Tensor

from nl_model.weights import join, split, tensor_digest
from pipelines.gate.probe import Score


@dataclass(frozen=True)
class TensorFacts:
    """One tensor as it lies on disk."""

    shape: Tuple[int, ...]
    dtype: str
    digest: str = ""
    """sha256 over shape, dtype and bytes."""
    finite: bool = True

    @classmethod
    def of(cls, tensor: Tensor) -> TensorFacts:
        """Of a tensor in memory."""
        finite = bool(torch.isfinite(tensor).all())
        return cls(tuple(tensor.shape), str(tensor.dtype), tensor_digest(tensor), finite)


@dataclass(frozen=True)
class ShardFacts:
    """One shard as it lies on disk, read back by another process than the one that wrote it."""

    file: str
    sha256: str
    """Of the file; empty where there is none."""
    rank: int = -1
    world: int = 0
    candidate: str = ""
    """Identity of the candidate it says it belongs to."""
    tensors: Dict[str, TensorFacts] = field(default_factory=dict)


class Claim(Protocol):
    """What the writer of a shard says about it; the shards of an index, in the order of their ranks."""

    @property
    def file(self) -> str:
        """Name of the file."""

    @property
    def sha256(self) -> str:
        """Checksum of the file."""

    @property
    def tensors(self) -> List[str]:
        """Names of its tensors."""


@dataclass(frozen=True)
class Storage:
    """A candidate as files."""

    identity: str
    """Identity of the candidate: a hash of its plan and its anchor."""
    claims: Sequence[Claim]
    found: Sequence[ShardFacts]
    wanted: Mapping[str, TensorFacts]
    """Names, shapes and dtypes that a release of this run holds (of its anchor)."""
    releases: Mapping[str, int] = field(default_factory=dict)
    """Numbers of the releases so far by the fingerprint of their weights."""

    @property
    def tensors(self) -> Dict[str, TensorFacts]:
        """All tensors found."""
        return {name: facts for shard in self.found for name, facts in shard.tensors.items()}


@dataclass(frozen=True)
class Evidence:
    """Everything the gate sees of a candidate."""

    candidate: Mapping[str, Score]
    """The student at rest, by source."""
    anchor: Mapping[str, Score]
    """The last promoted release, on the same sequences."""
    awake: Mapping[str, Score]
    """The awake model that the student started from, on those of the recent sources."""
    seen: Sequence[str]
    """Sources of the base and of the stream up to the snapshot."""
    recent: Sequence[str]
    """Sources of the round's recent experience."""
    storage: Storage
    divergence: Mapping[str, float] = field(default_factory=dict)
    """Mean KL(anchor || candidate) on fixed prompts of each source, in nats per token."""
    endings: Sequence[Tuple[float, float]] = ()
    """Loss on the last batch in nats per token, a pair per rank: of the student when training had ended, and of the
    candidate's weights as they were taken out of it."""
    best: Mapping[str, float] = field(default_factory=dict)
    """Best bits per byte of any release so far, by source."""
    seed: int = 0
    """Seed of the bootstrap."""

    @property
    def recently_seen(self) -> List[str]:
        """Recent sources that the run knows of: what must be learned."""
        return [source for source in self.recent if source in set(self.seen)]

    @property
    def older(self) -> List[str]:
        """Sources seen that are not recent: what must not be forgotten."""
        return [source for source in self.seen if source not in set(self.recent)]


def weights_fingerprint(digests: Mapping[str, str]) -> str:
    """One hash over the digests of a release's tensors by name, however they are sharded. Only `weight/` counts: two
    releases with the same weights compute the same, whatever the learner's offsets are."""
    weights = join(weight=split(digests, "weight"))
    lines: Iterable[str] = (f"{name} {weights[name]}\n" for name in sorted(weights))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
