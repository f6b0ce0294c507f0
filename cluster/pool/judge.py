"""A rank's part of the gate: a candidate is measured on its share of the probes, beside anchor and awake model.

Shapes: B sequences, S stored tokens (context + 1), T = S - 1, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Mapping, Sequence, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.storage.releases import Releases, Shard, layout
from nl_model.model import NestedLM, autocast
from pipelines.config.schema import Config
from pipelines.data.stream import Probe
from pipelines.gate.evidence import Evidence, ShardFacts, Storage
from pipelines.gate.probe import Score, measure, prompt_divergence
from pipelines.sleep.plan import RoundPlan


@dataclass(frozen=True)
class Verdict:
    """What one rank measured, by source."""

    candidate: Dict[str, Score] = field(default_factory=dict)
    """The student at rest."""
    anchor: Dict[str, Score] = field(default_factory=dict)
    awake: Dict[str, Score] = field(default_factory=dict)
    """The awake model that the student started from."""
    divergence: Dict[str, float] = field(default_factory=dict)
    """KL(anchor || candidate) on fixed prompts, in nats per token."""
    recent: List[str] = field(default_factory=list)
    """Sources of the round's recent experience (all of them, not only those scored here)."""
    ending: Tuple[float, float] = (0.0, 0.0)
    """Loss on this rank's share of the last batch, in nats per token: of the student, and of the candidate."""


class Judge:
    """Measures candidates. What it measured of the last candidate serves as the anchor's score of the next round."""

    def __init__(self, probes: Mapping[str, Probe], cfg: Config) -> None:
        self.probes, self.cfg = probes, cfg
        self.known: Dict[int, Dict[str, Score]] = {}
        """Scores by release, of the last round's anchor and of its candidate (whose number counts once it is live)."""

    def measure(
        self,
        number: int,
        candidate: NestedLM,
        anchor: NestedLM,
        awake: NestedLM,
        sources: List[str],
        recent: List[str],
        ending: Tuple[float, float],
    ) -> Verdict:
        """Score three models on some sources.

        Args:
            number: the anchor's release.
            recent: sources of the recent experience, for the verdict.
            ending: losses on the last batch, for the verdict.
        """
        precision = self.cfg.compute.precision

        def scores(model: NestedLM) -> Dict[str, Score]:
            return {source: measure(model, self.probes[source], precision) for source in sources}

        before = self.known.get(number, {})
        old = before if set(sources) <= set(before) else scores(anchor)
        new = scores(candidate)
        self.known = {number: old, number + 1: new}
        divergence = {
            source: prompt_divergence(
                candidate, anchor, self.probes[source], self.cfg.gate.prompts, self.cfg.run.seed, precision
            )
            for source in sources
        }
        return Verdict(new, {source: old[source] for source in sources}, scores(awake), divergence, recent, ending)


@torch.no_grad()
def ending_loss(model: Callable[[Tensor], Tensor], sequences_BS: Tensor, precision: str) -> float:
    """Mean loss of a model on a batch in nats per token."""
    with autocast(sequences_BS.device, precision):
        logits_BTV = model(sequences_BS[:, :-1])
    return float(F.cross_entropy(logits_BTV.flatten(0, 1).float(), sequences_BS[:, 1:].flatten()))


def candidate_identity(plan: RoundPlan, anchor: str) -> str:
    """Hash of what a candidate is made of; `anchor` is its anchor's fingerprint. The store's version is left out: it
    counts how often the store was opened."""
    parts = {key: value for key, value in plan.to_json().items() if key != "snapshot"}
    return hashlib.sha256(json.dumps([parts, anchor], sort_keys=True).encode()).hexdigest()


def gather_storage(
    releases: Releases, plan: RoundPlan, shards: Sequence[Shard], found: Sequence[ShardFacts]
) -> Storage:
    """A candidate as files: what its writers say, what was read back, and what a release of this run holds."""
    past = [releases.read(number) for number in releases.numbers()]
    return Storage(
        identity=candidate_identity(plan, releases.read(plan.anchor).fingerprint),
        claims=shards,
        found=found,
        wanted=layout(releases.directory(plan.anchor)),
        releases={release.weights: release.number for release in reversed(past) if release.shards[0].digests},
    )


def gather_evidence(
    verdicts: Sequence[Verdict], storage: Storage, seen: Sequence[str], best: Mapping[str, float], seed: int
) -> Evidence:
    """What the gate judges, put together from the ranks' shares."""

    def merged(side: str) -> Dict[str, Score]:
        return {source: score for verdict in verdicts for source, score in getattr(verdict, side).items()}

    return Evidence(
        candidate=merged("candidate"),
        anchor=merged("anchor"),
        awake=merged("awake"),
        seen=seen,
        recent=verdicts[0].recent,
        storage=storage,
        endings=[verdict.ending for verdict in verdicts],
        divergence={source: kl for verdict in verdicts for source, kl in verdict.divergence.items()},
        best=best,
        seed=seed,
    )
