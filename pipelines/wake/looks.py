"""Looks: the served model measured along the stream, on text that no gate, trigger or sampler sees.

What is served is the live release with the learner's levels as they stand. Beside it the release alone is measured:
what is learned awake must not cost more than it brings.
"""

from __future__ import annotations

import time
from typing import Dict, List, Tuple

import torch
from torch import Tensor

from nl_model.model import NestedLM
from nl_model.weights import load_into
from pipelines.config.schema import Config
from pipelines.data.module import DataModule
from pipelines.gate.probe import score, split_probe, thinned
from pipelines.wake.awake import Awake
from pipelines.wake.report import Look


class Looks:
    """Measures what is served. Recall, random states and gradient sums are left as they are."""

    def __init__(self, cfg: Config, data: DataModule) -> None:
        self.cfg, self.base = cfg, list(data.base_sources)
        whole = {name: split_probe(probe, cfg.gate.sequences)[0] for name, probe in data.probes().items()}
        self.whole = whole
        """What the last look is made of; `probes`: what the others are."""
        self.probes = {name: thinned(probe, cfg.report.sequences) for name, probe in whole.items()}
        self.model = NestedLM(cfg.model, cfg.levels, data.tokenizer.vocab_size)
        self.rested: Tuple[int, Dict[str, float]] = (-1, {})
        """Release whose scores these are, by source."""

    @torch.no_grad()
    def look(self, awake: Awake, streamed: List[str], last: bool = False) -> Look:
        """Measure the served model and the release alone on the base's sources and those streamed so far.

        last: of the stream; then on all sequences there are.
        """
        if last and self.probes is not self.whole:
            self.probes, self.rested = self.whole, (-1, {})
        start = time.perf_counter()
        sources = [s for s in dict.fromkeys([*self.base, *streamed]) if s in self.probes]
        weights = {name: p.detach() for name, p in awake.model.named_parameters()}
        number, known = self.rested
        known = known if number == awake.release else {}
        missing = [source for source in sources if source not in known]
        if missing:
            known = {**known, **self._scores({**weights, **awake.rest}, missing, awake.device)}
        self.rested = (awake.release, known)
        served = self._scores({**weights, **awake.served()}, sources, awake.device)
        rested = {source: known[source] for source in sources}
        return Look(awake.tokens, awake.release, served, rested, time.perf_counter() - start)

    def _scores(self, weights: Dict[str, Tensor], sources: List[str], device: torch.device) -> Dict[str, float]:
        self.model.to(device)
        load_into(self.model, weights)
        return score(self.model, self.probes, sources, self.cfg.compute.precision)
