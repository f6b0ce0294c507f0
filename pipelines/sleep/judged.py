"""The last stage of a round: the candidate as it will be read back, measured beside anchor and awake model."""

from __future__ import annotations

from typing import List

from nl_model.weights import load_into
from pipelines.gate.judge import Judge, Verdict
from pipelines.sleep.round import Candidate, Host, mean_loss


def judge_candidate(judge: Judge, found: Candidate, anchor: int, sources: List[str], host: Host) -> Verdict:
    """What this process measures of a candidate.

    Args:
        anchor: number of the release that is the anchor.
        sources: those that this process scores.
    """
    at_rest = host.build_model()
    load_into(at_rest, found.weights)
    stored = mean_loss(at_rest, found.last.tokens_BS, host.cfg.compute.precision)
    ending = (stored if found.ending is None else found.ending, stored)
    models = found.models
    awake = models.awake if found.steps else None  # nothing was trained: the candidate is the awake model
    return judge.measure(anchor, at_rest, models.anchor, awake, sources, found.recent_sources, ending)
