"""The gate: a candidate goes live only if it is whole, learned something, and forgets no more than its budget.

Checks are pure functions of the evidence. They run in order, and the first that fails decides.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from pipelines.config.gate import GateConfig
from pipelines.gate.bootstrap import Changes, paired_changes
from pipelines.gate.evidence import Evidence, Storage, weights_fingerprint
from pipelines.gate.probe import Score


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    passed: bool
    reason: str = ""
    """Why it failed."""
    figures: Dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What the gate decided, why, and on which figures (bits per byte on held-out probes)."""

    promoted: bool
    reason: str
    figures: Dict[str, Any]

    @property
    def word(self) -> str:
        """promoted or rejected."""
        return "promoted" if self.promoted else "rejected"


@dataclass(frozen=True)
class Comparison:
    """A candidate beside the anchor and the awake model; positive changes are losses."""

    anchor: Changes
    awake: Changes
    worst: str
    """The source seen that loses most against the anchor; one whose loss is not finite comes first."""

    @classmethod
    def of(cls, evidence: Evidence, cfg: GateConfig) -> Comparison:
        """Compare on all sources seen, and with the awake model on the recent ones; with intervals."""

        def against(old: Mapping[str, Score], sources: Sequence[str]) -> Changes:
            return paired_changes(evidence.candidate, old, sources, cfg.samples, cfg.confidence, evidence.seed)

        anchor = against(evidence.anchor, evidence.seen)
        change = anchor.means
        worst = max(evidence.seen, key=lambda source: _or_inf(change[source]))
        return cls(anchor, against(evidence.awake, evidence.recently_seen), worst)


CheckFunction = Callable[[Evidence, Comparison, GateConfig], Check]


def check_integrity(evidence: Evidence, _: Comparison, __: GateConfig) -> Check:
    """Files are what their writers wrote, belong to this candidate, are complete, and are no earlier release again."""
    storage = evidence.storage
    tensors = storage.tensors
    weights = weights_fingerprint({name: facts.digest for name, facts in tensors.items()})
    figures = {"shards": len(storage.claims), "tensors": len(tensors), "weights": weights}
    reason = _shard_fault(storage) or _tensor_fault(storage)
    if not reason and weights in storage.releases:
        reason = f"has the weights of release {storage.releases[weights]} again"
    return Check("integrity", not reason, reason or "", figures)


def _shard_fault(storage: Storage) -> Optional[str]:
    """What is wrong with the files; None where nothing is."""
    found = {shard.file: shard for shard in storage.found}
    for rank, claim in enumerate(storage.claims):
        shard = found.get(claim.file)
        if shard is None or not shard.sha256:
            return f"{claim.file} is missing"
        if shard.sha256 != claim.sha256:
            return f"{claim.file} is damaged: sha256 {shard.sha256[:12]}, its writer says {claim.sha256[:12]}"
        if (shard.rank, shard.world) != (rank, len(storage.claims)):
            return (
                f"{claim.file} is the shard of rank {shard.rank} of {shard.world}, not {rank} of {len(storage.claims)}"
            )
        if shard.candidate != storage.identity:
            return f"{claim.file} belongs to another candidate"
        if sorted(shard.tensors) != sorted(claim.tensors):
            return f"{claim.file} holds other tensors than its writer says"
    return None


def _tensor_fault(storage: Storage) -> Optional[str]:
    """What is wrong with the set of tensors; None where nothing is."""
    count = Counter(name for shard in storage.found for name in shard.tensors)
    twice = sorted(name for name, number in count.items() if number > 1)
    if twice:
        return f"{twice[0]} lies in two shards"
    missing, foreign = sorted(set(storage.wanted) - set(count)), sorted(set(count) - set(storage.wanted))
    if missing or foreign:
        return f"lacks {missing[0]}" if missing else f"holds {foreign[0]}, which no release has"
    tensors = storage.tensors
    for name, wanted in sorted(storage.wanted.items()):
        found = tensors[name]
        if (tuple(found.shape), found.dtype) != (tuple(wanted.shape), wanted.dtype):
            is_, should = f"{found.dtype} {tuple(found.shape)}", f"{wanted.dtype} {tuple(wanted.shape)}"
            return f"{name} is {is_} instead of {should}"
    return None


def check_finite(evidence: Evidence, _: Comparison, __: GateConfig) -> Check:
    """No weight is NaN or infinite."""
    bad = sorted(name for name, facts in evidence.storage.tensors.items() if not facts.finite)
    reason = f"{bad[0]} is not finite{f' (and {len(bad) - 1} more)' if len(bad) > 1 else ''}" if bad else ""
    return Check("finite", not bad, reason, {"not_finite": len(bad)})


def check_reproduction(evidence: Evidence, _: Comparison, cfg: GateConfig) -> Check:
    """The candidate still computes what training ended with: nothing was lost or mixed up on the way out of it."""
    mismatch = [abs(stored - trained) for trained, stored in evidence.endings]
    worst = max(mismatch, default=0.0)
    figures = {"endings": [list(pair) for pair in evidence.endings], "mismatch": worst}
    if all(one <= cfg.max_mismatch for one in mismatch):  # false for NaN
        return Check("reproduction", True, "", figures)
    trained, stored = max(evidence.endings, key=lambda pair: _or_inf(abs(pair[1] - pair[0])))
    reason = f"does not reproduce its training: {stored:.3f} nats per token on the last batch instead of {trained:.3f}"
    return Check("reproduction", False, f"{reason}, gate.max_mismatch={cfg.max_mismatch}", figures)


def check_loss(evidence: Evidence, comparison: Comparison, cfg: GateConfig) -> Check:
    """Held-out loss against the anchor on all sources seen, and against anchor and awake model on the recent ones."""
    mean = comparison.anchor.mean(evidence.seen)
    recent = evidence.recently_seen
    figures: Dict[str, Any] = {"mean_change": asdict(mean)}
    bad = sorted(source for source in evidence.seen if not math.isfinite(evidence.candidate[source].bpb))
    if bad:
        return Check("loss", False, f"loss on {', '.join(bad)} is not finite", figures)
    reasons = []
    if mean.end(cfg.bound) > cfg.max_regression:
        lost = f"{mean.end(cfg.bound):.3f} bits per byte on average{_which(cfg)}"
        reasons.append(f"is worse by {lost}, more than gate.max_regression={cfg.max_regression}")
    if recent:
        gained, kept = comparison.anchor.mean(recent), comparison.awake.mean(recent)
        figures.update(recent=list(recent), recent_change=asdict(gained), recent_change_awake=asdict(kept))
        if gained.low >= -cfg.min_progress:
            lost = f"{gained.mean:+.3f} ({gained.low:+.3f} .. {gained.high:+.3f}) bits per byte on {', '.join(recent)}"
            reasons.append(f"learned nothing: {lost}, gate.min_progress={cfg.min_progress}")
        if kept.low > cfg.max_awake_loss:
            lost = f"{kept.mean:.3f} bits per byte ({kept.low:.3f} at least) on {', '.join(recent)}"
            reasons.append(f"is worse than the awake model by {lost}, gate.max_awake_loss={cfg.max_awake_loss}")
    return Check("loss", not reasons, reasons[0] if reasons else "", figures)


def check_forgetting(evidence: Evidence, comparison: Comparison, cfg: GateConfig) -> Check:
    """Every source seen stays within its budget, against the anchor and against the best release so far."""
    worst, over = comparison.worst, []
    intervals = {source: comparison.anchor.of(source) for source in evidence.seen}
    drift: Dict[str, float] = {}
    for source in sorted(evidence.seen, key=lambda s: -intervals[s].mean):
        budget, interval = cfg.budgets.get(source, cfg.max_forgetting), intervals[source]
        key = f"gate.budgets.{source}" if source in cfg.budgets else "gate.max_forgetting"
        if interval.end(cfg.bound) > budget:
            lost = f"{interval.end(cfg.bound):.3f} bits per byte{_which(cfg)}"
            over.append(f"forgets {source} by {lost}, more than {key}={budget}")
        if math.isfinite(evidence.best.get(source, math.inf)):
            drift[source] = evidence.candidate[source].bpb - evidence.best[source]
            if drift[source] + interval.end(cfg.bound) - interval.mean > cfg.max_drift:
                lost = f"{drift[source]:.3f} bits per byte since the best release"
                over.append(f"has lost {lost} on {source}, more than gate.max_drift={cfg.max_drift}")
    figures = {
        "worst": {"source": worst, **asdict(intervals[worst])},
        "intervals": {source: [interval.low, interval.high] for source, interval in intervals.items()},
        "drift": drift,
    }
    return Check("forgetting", not over, over[0] if over else "", figures)


def check_divergence(evidence: Evidence, _: Comparison, cfg: GateConfig) -> Check:
    """On prompts of older sources the candidate still says about what the anchor says."""
    older = [source for source in evidence.older if source in evidence.divergence]
    mean = sum(evidence.divergence[source] for source in older) / len(older) if older else 0.0
    figures = {"mean": mean, "older": older, "by_source": dict(evidence.divergence)}
    if not mean <= cfg.max_divergence:
        reason = f"parts from the anchor by {mean:.3f} nats per token on prompts of {', '.join(older)}"
        return Check("divergence", False, f"{reason}, more than gate.max_divergence={cfg.max_divergence}", figures)
    return Check("divergence", True, "", figures)


CHECKS: Tuple[CheckFunction, ...] = (
    check_integrity,
    check_finite,
    check_reproduction,
    check_loss,
    check_forgetting,
    check_divergence,
)


def decide(evidence: Evidence, cfg: GateConfig, checks: Sequence[CheckFunction] = CHECKS) -> Decision:
    """Judge a candidate on the sources seen so far. Figures of every check that ran stand in the decision."""
    comparison = Comparison.of(evidence, cfg)
    change = comparison.anchor.means
    figures: Dict[str, Any] = {
        side: {source: score.bpb for source, score in getattr(evidence, side).items()}
        for side in ("candidate", "anchor", "awake")
    }
    mean_change = sum(change.values()) / len(evidence.seen)
    figures.update(
        seen=list(evidence.seen),
        recent=list(evidence.recent),
        worst={"source": comparison.worst, "loss": change[comparison.worst]},
        mean_change=mean_change,
    )
    ran: List[Check] = []
    for check in checks:
        ran.append(check(evidence, comparison, cfg))
        if not ran[-1].passed:
            break
    figures["checks"] = [asdict(check) for check in ran]
    if not ran[-1].passed:
        return Decision(False, ran[-1].reason, figures)
    worst = comparison.worst
    return Decision(True, f"worst source {worst} {change[worst]:+.3f}, mean {mean_change:+.3f} bits per byte", figures)


def _or_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _which(cfg: GateConfig) -> str:
    return "" if cfg.bound == "mean" else f" at the {cfg.bound} end of its interval"
