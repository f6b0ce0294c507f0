"""The gate: what goes live, what does not, and that it says why."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any, Dict, List, Mapping, Sequence

import numpy as np
import pytest

from pipelines.config.gate import GateConfig
from pipelines.gate.decision import CHECKS, Decision, decide
from pipelines.gate.evidence import Evidence, ShardFacts, Storage, TensorFacts, weights_fingerprint
from pipelines.gate.probe import Score

CFG = GateConfig(max_forgetting=0.25, max_regression=0.05)
ANCHOR = {"a": 2.0, "b": 3.0, "c": 4.0}
AWAKE = {"a": 2.5, "b": 2.5, "c": 4.0}
SEEN = ["a", "b"]
SEQUENCES = 16


@dataclass(frozen=True)
class Claim:
    file: str
    sha256: str
    tensors: List[str]


FILES = {"shard-0": ["weight/x", "weight/y"], "shard-1": ["offset/x", "weight/z"]}
FACTS = {name: TensorFacts((2, 3), "torch.float32", f"digest of {name}") for names in FILES.values() for name in names}


def storage(**changes: Any) -> Storage:
    """Two shards as they should be."""
    found = [
        ShardFacts(file, f"sum of {file}", rank, 2, "me", {name: FACTS[name] for name in names})
        for rank, (file, names) in enumerate(FILES.items())
    ]
    claims = [Claim(file, f"sum of {file}", names) for file, names in FILES.items()]
    wanted = {name: TensorFacts(facts.shape, facts.dtype) for name, facts in FACTS.items()}
    return replace(Storage("me", claims, found, wanted), **changes)


def score(bpb: float, spread: float = 0.0) -> Score:
    """A probe of equal sequences; `spread` moves half of them up and half of them down."""
    signs = np.where(np.arange(SEQUENCES) % 2, 1.0, -1.0)
    nats = (bpb + spread * signs) * 8.0 * math.log(2)
    return Score(tuple(nats.tolist()), (8.0,) * SEQUENCES)


def evidence(scores: Mapping[str, float], seen: Sequence[str] = SEEN, **changes: Any) -> Evidence:
    sides = [{source: score(bpb) for source, bpb in side.items()} for side in (scores, ANCHOR, AWAKE)]
    return replace(Evidence(sides[0], sides[1], sides[2], seen, [], storage()), **changes)


def judge(scores: Mapping[str, float], cfg: GateConfig = CFG, **changes: Any) -> Decision:
    return decide(evidence(scores, **changes), cfg)


def test_a_candidate_within_its_budgets_is_promoted() -> None:
    decision = judge({"a": 2.125, "b": 2.5, "c": 9.0}, recent=["b"])
    assert decision.promoted and decision.word == "promoted"
    assert decision.figures["worst"] == {"source": "a", "loss": pytest.approx(0.125)}
    assert decision.figures["mean_change"] == pytest.approx(-0.1875)
    assert decision.figures["seen"] == SEEN and decision.figures["anchor"] == pytest.approx(ANCHOR)
    assert decision.figures["awake"] == pytest.approx(AWAKE)
    assert decision.figures["candidate"]["c"] == pytest.approx(9.0)
    assert "a +0.125" in decision.reason
    names = [check["name"] for check in decision.figures["checks"]]
    assert names == ["integrity", "finite", "reproduction", "loss", "forgetting", "divergence"]
    assert len(CHECKS) == len(names)
    json.dumps(decision.figures)


def test_forgetting_one_source_is_not_bought_by_gains_elsewhere() -> None:
    decision = judge({"a": 2.5, "b": 1.0, "c": 4.0})
    assert not decision.promoted and decision.word == "rejected"
    assert decision.reason == "forgets a by 0.500 bits per byte, more than gate.max_forgetting=0.25"
    assert [check["name"] for check in decision.figures["checks"]][-1] == "forgetting", "later checks do not run"
    assert judge({"a": 2.249, "b": 1.0, "c": 4.0}).promoted


def test_a_source_may_have_a_budget_of_its_own() -> None:
    cfg = replace(CFG, budgets={"a": 0.1})
    assert "more than gate.budgets.a=0.1" in judge({"a": 2.2, "b": 1.0}, cfg).reason
    assert judge({"a": 1.0, "b": 3.2}, cfg).promoted


def test_small_losses_must_not_add_up_beyond_the_drift_budget() -> None:
    best = {"a": 1.85, "b": 3.0}
    assert judge({"a": 2.1, "b": 2.5}, best=best).promoted, "no bound by default"
    decision = judge({"a": 2.1, "b": 2.5}, replace(CFG, max_drift=0.2), best=best)
    assert decision.reason == "has lost 0.250 bits per byte since the best release on a, more than gate.max_drift=0.2"


def test_a_small_loss_everywhere_is_a_regression() -> None:
    decision = judge({"a": 2.125, "b": 3.125, "c": 4.0})
    assert not decision.promoted
    assert "worse by 0.125 bits per byte on average, more than gate.max_regression=0.05" in decision.reason


def test_a_negative_budget_asks_for_progress() -> None:
    cfg = GateConfig(max_regression=-0.1)
    assert not judge({"a": 1.95, "b": 2.95}, cfg).promoted
    assert judge({"a": 1.75, "b": 2.75}, cfg).promoted


def test_sources_not_seen_yet_do_not_count() -> None:
    assert judge({"a": 2.0, "b": 3.0, "c": 99.0}).promoted
    assert not judge({"a": 2.0, "b": 3.0, "c": 99.0}, seen=[*SEEN, "c"]).promoted


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", SEEN)
def test_a_loss_that_is_not_finite_is_rejected(value: float, place: str) -> None:
    decision = judge({**{"a": 1.0, "b": 1.0, "c": 1.0}, place: value})
    assert not decision.promoted
    assert decision.reason == f"loss on {place} is not finite"
    assert decision.figures["worst"]["source"] == place


def test_who_learned_nothing_of_the_recent_sources_stays_out() -> None:
    for recent, changed in ((["b"], {}), (["a", "b"], {"a": 1.9})):
        decision = judge({**ANCHOR, **changed}, replace(CFG, max_awake_loss=9.0, min_progress=0.0), recent=recent)
        assert decision.promoted == bool(changed), decision.reason
    held = replace(CFG, max_awake_loss=9.0)
    assert judge({**ANCHOR, "b": 3.02}, held, recent=["b"]).promoted, "what is known need not get better every round"
    decision = judge({**ANCHOR, "b": 3.02}, replace(CFG, min_progress=0.0), recent=["b"])
    assert "learned nothing: +0.020 (+0.020 .. +0.020) bits per byte on b" in decision.reason
    assert judge({**ANCHOR, "b": 3.02}, replace(CFG, min_progress=-math.inf), recent=["a"]).promoted


def test_what_wake_learned_must_not_be_lost() -> None:
    decision = judge({"a": 2.0, "b": 2.875}, recent=["b"])
    assert "is worse than the awake model by 0.375 bits per byte (0.375 at least) on b" in decision.reason
    assert judge({"a": 2.0, "b": 2.75}, recent=["b"]).promoted


@pytest.mark.parametrize(("bound", "promoted"), [("low", True), ("mean", True), ("high", False)])
def test_the_end_of_the_interval_that_counts_is_a_setting(bound: str, promoted: bool) -> None:
    noisy = evidence({"a": 2.2, "b": 2.0}, candidate={"a": score(2.2, spread=0.3), "b": score(2.0)})
    decision = decide(noisy, replace(CFG, bound=bound))
    assert decision.promoted == promoted
    low, high = decision.figures["checks"][4]["figures"]["intervals"]["a"]
    # 16 equal pairs at +-0.3: the standard error of their mean is 0.3 / 4.
    assert low == pytest.approx(0.2 - 1.96 * 0.075, abs=0.02) and high == pytest.approx(0.2 + 1.96 * 0.075, abs=0.02)
    assert promoted or "at the high end of its interval" in decision.reason


def test_parting_from_the_anchor_counts_on_older_sources_only() -> None:
    candidate = {"a": 2.0, "b": 2.0}
    assert judge(candidate, recent=["b"], divergence={"a": 0.2, "b": 9.0}).promoted
    decision = judge(candidate, recent=["b"], divergence={"a": 1.2, "b": 0.0})
    assert "parts from the anchor by 1.200 nats per token on prompts of a, more than gate.max_divergence" in (
        decision.reason
    )
    assert not judge(candidate, recent=["b"], divergence={"a": math.nan}).promoted


GOOD = {"a": 1.0, "b": 1.0}


def refused(changed: Storage, check: str = "integrity") -> str:
    decision = judge(GOOD, storage=changed)
    assert not decision.promoted
    assert decision.figures["checks"][-1]["name"] == check
    return decision.reason


def with_shard(place: int, **changes: Any) -> Storage:
    found = list(storage().found)
    found[place] = replace(found[place], **changes)
    return storage(found=found)


def with_tensor(name: str, facts: TensorFacts) -> Storage:
    rank = next(i for i, names in enumerate(FILES.values()) if name in names)
    return with_shard(rank, tensors={**storage().found[rank].tensors, name: facts})


def test_shards_must_be_what_their_writers_wrote() -> None:
    assert judge(GOOD).promoted
    assert refused(storage(found=storage().found[:1])) == "shard-1 is missing"
    assert refused(with_shard(0, sha256="")) == "shard-0 is missing"
    assert "shard-1 is damaged: sha256 other" in refused(with_shard(1, sha256="other"))
    assert "belongs to another candidate" in refused(with_shard(1, candidate="you"))
    assert "is the shard of rank 1 of 2, not 0 of 2" in refused(with_shard(0, rank=1))
    assert "of 3, not" in refused(with_shard(0, world=3))
    assert "holds other tensors than its writer says" in refused(with_shard(0, tensors={"weight/x": FACTS["weight/x"]}))


def test_the_set_of_tensors_must_be_that_of_a_release() -> None:
    wanted = dict(storage().wanted)
    assert refused(storage(wanted={**wanted, "weight/more": FACTS["weight/x"]})) == "lacks weight/more"
    assert "holds weight/z, which no release has" in refused(
        storage(wanted={name: facts for name, facts in wanted.items() if name != "weight/z"})
    )
    assert "(3, 2)" in refused(with_tensor("weight/y", replace(FACTS["weight/y"], shape=(3, 2))))
    assert "torch.float16" in refused(with_tensor("weight/y", replace(FACTS["weight/y"], dtype="torch.float16")))
    claims, found = list(storage().claims), list(storage().found)
    claims[1] = Claim("shard-1", "sum of shard-1", [*FILES["shard-1"], "weight/x"])
    found[1] = replace(found[1], tensors={**found[1].tensors, "weight/x": FACTS["weight/x"]})
    assert refused(storage(claims=claims, found=found)) == "weight/x lies in two shards"


def test_weights_that_were_live_before_are_no_candidate() -> None:
    digests = {name: facts.digest for name, facts in FACTS.items()}
    known = {weights_fingerprint(digests): 3}
    assert refused(storage(releases=known)) == "has the weights of release 3 again"
    offset = replace(FACTS["offset/x"], digest="another offset")
    assert "release 3" in refused(replace(with_tensor("offset/x", offset), releases=known)), "offsets do not count"
    other = replace(FACTS["weight/x"], digest="other weights")
    assert judge(GOOD, storage=replace(with_tensor("weight/x", other), releases=known)).promoted


def test_weights_that_are_not_finite_are_refused_before_any_loss_is_looked_at() -> None:
    changed = with_tensor("weight/y", replace(FACTS["weight/y"], finite=False))
    assert refused(changed, "finite") == "weight/y is not finite"


def test_a_candidate_reproduces_the_end_of_its_training() -> None:
    assert judge(GOOD, endings=[(2.0, 2.019), (1.5, 1.5)]).promoted
    decision = judge(GOOD, endings=[(2.0, 2.019), (1.5, 1.6)])
    assert "1.600 nats per token on the last batch instead of 1.500, gate.max_mismatch=0.02" in decision.reason
    assert not judge(GOOD, endings=[(2.0, 1.9)]).promoted, "better is not the same either"
    assert not judge(GOOD, endings=[(2.0, math.nan)]).promoted


def test_intervals_are_seeded_and_paired() -> None:
    rng = np.random.default_rng(5)
    hard = rng.normal(0.0, 3.0, SEQUENCES) + 20.0  # sequences differ much more than the models do

    def side(shift: float) -> Dict[str, Score]:
        return {s: Score(tuple((hard + shift).tolist()), (8.0,) * SEQUENCES) for s in SEEN}

    cases = [
        decide(replace(evidence(GOOD), candidate=side(0.1), anchor=side(0.0), awake=side(0.0), seed=seed), CFG)
        for seed in (0, 0, 1)
    ]
    one, same, other = ([c["figures"] for c in case.figures["checks"]] for case in cases)
    assert one == same
    low, high = one[4]["intervals"]["a"]
    assert high - low < 1e-9, "a constant difference has no spread, however hard the sequences are"
    assert low == pytest.approx(0.1 / 8.0 / math.log(2)) and other[4]["intervals"]["a"] == pytest.approx([low, high])


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("max_forgetting", -1.0, "gate.max_forgetting"),
        ("max_regression", math.nan, "gate.max_regression=nan"),
        ("min_progress", math.nan, "gate.min_progress=nan"),
        ("budgets", {"a": -0.1}, "gate.budgets.a"),
        ("bound", "middle", "gate.bound='middle'"),
        ("patience", 0, "gate.patience"),
        ("samples", 3, "gate.samples"),
    ],
)
def test_bad_settings_are_refused_by_name(key: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GateConfig(**{key: value})
