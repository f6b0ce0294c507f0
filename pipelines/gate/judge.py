"""One process's part of the gate: a candidate is measured on its share of the probes, beside anchor and awake model.

Held-out text is split once: what the gate decides on is never what reports are made of (`split_probe`).
Shapes: B sequences, S stored tokens (context + 1), T = S - 1, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from nl_model.model import NestedLM
from pipelines.config.schema import Config
from pipelines.data.stream import Probe
from pipelines.gate.evidence import Evidence, Storage
from pipelines.gate.probe import Score, measure, prompt_divergence, score, split_probe, thinned


@dataclass(frozen=True)
class Verdict:
    """What one process measured, by source."""

    candidate: Dict[str, Score] = field(default_factory=dict)
    """The student at rest, on the gate's sequences."""
    anchor: Dict[str, Score] = field(default_factory=dict)
    awake: Dict[str, Score] = field(default_factory=dict)
    """The awake model of the round's mark, on the recent sources: no decision asks for more."""
    divergence: Dict[str, float] = field(default_factory=dict)
    """KL(anchor || candidate) on fixed prompts, in nats per token."""
    recent: List[str] = field(default_factory=list)
    """Sources of the round's recent experience (all of them, not only those scored here)."""
    ending: Tuple[float, float] = (0.0, 0.0)
    """Loss on this rank's share of the last batch, in nats per token: of the student, and of the candidate."""
    row: Dict[str, float] = field(default_factory=dict)
    """The candidate's bits per byte on the sequences that reports are made of: no decision sees them."""
    tokens: int = 0
    """Tokens of the forward passes that the decision took."""


class Judge:
    """Measures candidates. What it measured of the last candidate serves as the anchor's score of the next round."""

    def __init__(self, probes: Mapping[str, Probe], cfg: Config) -> None:
        self.cfg = cfg
        both = {source: split_probe(probe, cfg.gate.sequences) for source, probe in probes.items()}
        most = cfg.report.sequences
        self.reported = {source: thinned(reported, most) for source, (reported, _) in both.items()}
        """What rows of the matrix are made of."""
        self.probes = {source: gate for source, (_, gate) in both.items()}
        """What the gate sees."""
        self.known: Dict[int, Dict[str, Score]] = {}
        """Scores by release, of the last round's anchor and of its candidate (whose number counts once it is live)."""

    def measure(
        self,
        number: int,
        candidate: NestedLM,
        anchor: NestedLM,
        awake: Optional[NestedLM],
        sources: List[str],
        recent: List[str],
        ending: Tuple[float, float],
    ) -> Verdict:
        """Score candidate and anchor on some sources, and the awake model on the recent ones among them.

        Args:
            number: the anchor's release.
            awake: None where it is the candidate.
            recent: sources of the recent experience.
            ending: losses on the last batch, for the verdict.
        """
        precision, gate = self.cfg.compute.precision, self.cfg.gate

        def scores(model: NestedLM, among: Sequence[str] = sources) -> Dict[str, Score]:
            return {source: measure(model, self.probes[source], precision) for source in among}

        before = self.known.get(number, {})
        is_known = set(sources) <= set(before)
        old = before if is_known else scores(anchor)
        new = scores(candidate)
        self.known = {number: old, number + 1: new}
        divergence = {
            source: prompt_divergence(
                candidate, anchor, self.probes[source], gate.prompts, self.cfg.run.seed, precision
            )
            for source in (sources if math.isfinite(gate.max_divergence) else ())
        }
        row = score(candidate, self.reported, sources, precision)
        lately = [source for source in sources if source in recent]
        scored = [*sources * (1 + (not is_known)), *(lately if awake is not None else ())]
        read = sum(self.probes[source].tokens[:, 1:].size for source in scored)
        asked = sum(min(gate.prompts, len(self.probes[source].tokens)) for source in divergence)
        read += 2 * asked * self.cfg.model.context
        found = {source: old[source] for source in sources}
        kept = {source: new[source] for source in lately} if awake is None else scores(awake, lately)
        return Verdict(new, found, kept, divergence, recent, ending, row, read)


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
