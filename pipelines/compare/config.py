"""What is compared: methods, regimes, budgets, and the settings that tuning may choose from."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Dict

from pipelines.config.checks import at_least, one_of, share


@dataclass(frozen=True)
class Regime:
    """What a trial may use."""

    stored: float = float("inf")
    """Bytes that may be stored at any time, as a share of the stream's bytes."""
    asleep: float = 0.0
    """Share of all FLOPs that an awake pass which writes would leave: it sets every method's total. Circadian, which
    only reads where so few are left, has more of them asleep. 0: the total is `Options.epochs`."""

    def epochs(self, given: float, wake: float) -> float:
        """FLOPs per stream token, in full training steps. wake: those of a wake step."""
        return wake / (1.0 - self.asleep) if self.asleep else given


REGIMES: Dict[str, Regime] = {
    "whole": Regime(),
    "cap5": Regime(stored=0.05),
    "cap1": Regime(stored=0.01),
    "sleep50": Regime(asleep=0.5),
    "sleep25": Regime(asleep=0.25),
    "sleep10": Regime(asleep=0.1),
}
"""By name."""
FAMILIES = ("plain", "joint", "circadian")
SCHEDULES = ("rewarm", "constant")


@dataclass(frozen=True)
class Night:
    """How Circadian spends its FLOPs: the settings that ablations change one at a time."""

    wake: str = "learner"
    """Levels written awake: learner (the fast ones), fastest (of these, so that there are two levels in all), none (so
    that there is one), all (every level at one frequency)."""
    wake_lr: float = 0.5
    """Awake step sizes, in multiples of the levels' own."""
    wake_cycle: bool = True
    """Let awake step sizes fall over a source as a cosine; else they stay."""
    wake_batch: int = 0
    """Sequences per awake step, the learner's periods in proportion; 0: half a sleeping batch (sleep.batch) where sleep
    goes on from awake passes, so that replay fills the other half, else as configured (wake.batch)."""
    handover: float = 0.5
    """Share of every awake batch that sleep goes on with from the awake pass, which only scored it: it runs all levels
    backwards and steps, with as many replayed sequences as there are FLOPs for; awake levels learn the others alone.
    The share rises to 1 with the share of the past that is not held, and falls where FLOPs are few; where they are very
    few the awake pass only reads. A source has as many nights as batches then.
    0: nights pass over the text again, as `rounds`, `recent`, `scarce_recent`, `recent_end`, `cycle` and `online` say,
    which mean nothing else; `lwf` and `repeats` mean nothing then, and `late` cannot be."""
    late: bool = False
    """Take the sleeping step on a batch while the next one is read, whose pass does not know of it then. Else the next
    batch waits for it."""
    rounds: int = 16
    """Sleeps per source (or per stretch of a stream without boundaries)."""
    recent: float = 0.4
    """Share of recent experience in a sleeping batch; the rest is replayed."""
    scarce_recent: float = 0.65
    """The same where nothing of the past is held; in between, a mean by the share of sequences that are."""
    recent_end: float = -1.0
    """The same at the end of a night, reached linearly; negative: as at its start."""
    bank: float = 0.5
    """Share of every night's FLOPs (what it needs for text handed over aside) that is kept for a deep sleep, where the
    store holds most of the past."""
    deep_every: int = 0
    """Sources between two deep sleeps; 0: one, when the stream has ended."""
    deep_passes: float = 1.0
    """Most FLOPs kept for it, in passes over what is stored: a small store is soon known by heart."""
    deep_recent: float = 0.12
    """Share of recent experience in a deep sleep."""
    teacher: float = 0.0
    """Weight of the awake model's distribution on recent experience."""
    anchor: float = 0.0
    """Weight of the distribution, on old experience, of the model that the last source left behind."""
    lwf: float = 0.5
    """Weight of that model's distribution where sleep goes on from awake passes, times the share of sequences not held:
    on new text and on replayed text."""
    repeats: float = 10.0
    """Times per source that sleep which goes on from awake passes replays a stored sequence, at most and on average,
    where the store forgets; new text is read once more instead."""
    scarce: bool = True
    """Let the anchor pull only as far as the store forgets: its weights times the share of sequences not held."""
    merge: float = 0.0
    """Weight of that model's weights in what a source leaves behind, times the same share."""
    dream: float = 0.0
    """Share of replayed sequences that are dreamt instead, times the same share: continuations of stored text by the
    last boundary's model, learned from what it says of them."""
    on_policy: float = 0.0
    """Share of steps in which the student continues its batch itself and is measured on what it said."""
    slots: int = 0
    """Rank of the low-rank slots that a night trains and then folds into the pool's levels; 0: all weights train."""
    gate: bool = True
    """Judge candidates, where the text for it fits into a tenth of the store; a rejected one is thrown away, its FLOPs
    are spent."""
    online: bool = False
    """Spend the sleeping FLOPs on plain replay between wake steps, without nights."""
    cycle: bool = True
    """One schedule of the step size over all nights of a source, instead of one per night."""
    keep_moments: bool = True
    """Carry the optimizer's moments from round to round."""
    floor: float = 0.05
    """Where the cosine of a round ends, as a share of its peak."""
    night_floor: float = 0.3
    """The same of nights that a deep sleep follows: that one cools down for them."""
    balance: float = 0.5
    """0: replay every stored sequence equally often. 1: every source equally often."""
    recall: bool = True
    """Read together with recall (nl_model/recall.py), where the whole history is stored. Nothing is trained on it."""
    fewest: bool = True
    """Where most of the past is held, replay first what was trained on the fewest times; else draw with replacement."""

    def __post_init__(self) -> None:
        one_of("wake", self.wake, ("learner", "fastest", "all", "none"))
        at_least("wake_lr", self.wake_lr, 0)
        at_least("wake_batch", self.wake_batch, 0)
        at_least("rounds", self.rounds, 1)
        at_least("deep_every", self.deep_every, 0)
        at_least("deep_passes", self.deep_passes, 0)
        at_least("repeats", self.repeats, 0)
        shares = ("recent", "bank", "deep_recent", "teacher", "anchor", "merge", "scarce_recent", "dream")
        for key in (*shares, "on_policy", "floor", "night_floor", "balance", "lwf"):
            share(key, getattr(self, key))
        at_least("slots", self.slots, 0)
        share("recent_end", max(0.0, self.recent_end))
        share("handover", self.handover)
        own = [k for k in ("teacher", "anchor", "dream", "on_policy", "slots", "online") if getattr(self, k)]
        if self.handover and (own or self.wake == "all"):
            raise ValueError(
                f"handover={self.handover} leaves no pass of sleep's own over new text, which "
                f"{', '.join(own) or 'wake=all'} needs; set handover=0"
            )
        if self.late and not self.handover:
            raise ValueError("late=true needs sleep that goes on from awake passes; set handover above 0")
        if self.on_policy and not (self.teacher or self.anchor):
            raise ValueError("on_policy needs a guide; give teacher or anchor a weight")

    def idle(self) -> Dict[str, str]:
        """Settings without effect beside the others, and what takes it from them."""
        found = dict.fromkeys(("lwf", "repeats"), "handover=0")
        if self.handover:
            own = ("rounds", "recent", "scarce_recent", "recent_end", "cycle", "online")
            found = dict.fromkeys(own, f"handover={self.handover:g}")
        if not self.bank:
            found |= dict.fromkeys(("deep_every", "deep_passes", "deep_recent", "night_floor"), "bank=0")
        if self.wake == "none":
            found |= dict.fromkeys(("wake_lr", "wake_cycle"), "wake=none")
        if self.online:
            found |= dict.fromkeys(("rounds", "cycle"), "online=true")
        held = ("merge", "anchor", "dream", *(("lwf",) if self.handover else ()))
        if not any(getattr(self, key) for key in held):
            found["scarce"] = f"{' and '.join(held)} 0"
        return found


@dataclass(frozen=True)
class Method:
    """One way to learn the stream."""

    family: str = "plain"
    """plain: online training with replay and regularisers. joint: all text at once. circadian: wake and sleep."""
    replay: float = 0.0
    """Share of replayed sequences in a batch."""
    schedule: str = "rewarm"
    """Step size: re-warmed with a cosine over every source, or constant after one warm-up."""
    ewc: float = 0.0
    """Strength of the quadratic pull to the weights of earlier sources (online EWC)."""
    lwf: float = 0.0
    """Weight of distillation from the model of the last boundary, on everything that is trained on."""
    der: float = 0.0
    """Weight of distillation from stored log-probabilities on replayed text (DER++)."""
    der_top: int = 8
    """Log-probabilities stored per token; fewer where a batch of sequences would not fit into the store."""
    ema: float = 0.0
    """Decay per step of the averaged weights that are scored; 0: the trained ones."""
    merge: float = 0.0
    """Weight of the last boundary's model in what a boundary leaves behind (merging)."""
    reptile: float = 0.0
    """Step of the outer update towards the inner steps' end (MER); 0: none."""
    reptile_every: int = 16
    """Inner steps per outer update."""
    balance: float = 0.0
    """0: replay every stored sequence equally often. 1: every source equally often."""
    joins: int = 1
    """Times per source that new text joins what is replayed, where it is not held for more passes; 1: at its end."""
    lora: int = 0
    """Rank of the adapters that train, merged at boundaries; 0: all weights train."""
    night: Night = field(default_factory=Night)
    """Settings of the circadian family."""

    def __post_init__(self) -> None:
        one_of("family", self.family, FAMILIES)
        one_of("schedule", self.schedule, SCHEDULES)
        for key in ("replay", "lwf", "der", "ema", "merge", "reptile", "balance"):
            share(key, getattr(self, key))
        at_least("ewc", self.ewc, 0)
        at_least("lora", self.lora, 0)
        at_least("der_top", self.der_top, 1)
        at_least("reptile_every", self.reptile_every, 1)
        at_least("joins", self.joins, 1)

    def idle(self) -> Dict[str, str]:
        """Settings without effect beside the others, and what takes it from them."""
        if self.family == "joint":
            return dict.fromkeys((key.name for key in fields(self)), "all text learned at once")
        needs = {"der": "replay", "der_top": "der", "reptile_every": "reptile", "balance": "replay"}
        return {key: f"{other}=0" for key, other in needs.items() if not getattr(self, other)}

    @property
    def keeps_data(self) -> bool:
        """Whether a bound on stored bytes changes the method: it replays, or reads the same text more than once."""
        return self.family != "joint"


REPLAY = Method(replay=0.5)
CIRCADIAN = Method("circadian")


OWN_PASSES = Night(handover=0.0, lwf=0.0, merge=0.45, bank=0.45, night_floor=0.05, fewest=False, recall=False)
NIGHTS = replace(CIRCADIAN, night=OWN_PASSES)
"""Sixteen nights per source that pass over the day's text themselves: what guides, slots and dreams are tried on."""


def _night(base: Method = CIRCADIAN, **changes: Any) -> Method:
    return replace(base, night=replace(base.night, **changes))


METHODS: Dict[str, Method] = {
    "circadian": CIRCADIAN,
    "naive": Method(),
    "joint": Method("joint"),
    "replay_5": replace(REPLAY, replay=0.05),
    "replay_25": replace(REPLAY, replay=0.25),
    "replay_50": REPLAY,
    "replay_tuned": replace(REPLAY, replay=0.65),
    "replay_merged": replace(REPLAY, merge=0.25),
    "replay_balanced": replace(REPLAY, balance=0.5),
    "der": replace(REPLAY, der=0.3),
    "ewc": Method(ewc=0.1),
    "lwf": Method(lwf=0.3),
    "ema": Method(ema=0.99),
    "mer": replace(REPLAY, reptile=0.7),
    "lora": Method(lora=16),
    "one_frequency": _night(NIGHTS, wake="all"),
    "sleep_as_replay": _night(NIGHTS, online=True, bank=0.0),
    "circadian_no_wake": _night(wake="none"),
    "circadian_two_levels": _night(wake="fastest"),
    "circadian_no_gate": _night(gate=False),
    "circadian_no_deep_sleep": _night(bank=0.0),
    "circadian_not_held": _night(lwf=0.0),
    "circadian_merging": _night(lwf=0.0, merge=0.35),
    "circadian_never_again": _night(repeats=1e6),
    "circadian_unbalanced": _night(balance=0.0),
    "circadian_repeats": _night(fewest=False),
    "circadian_cool_nights": _night(night_floor=0.05),
    "circadian_late": _night(late=True),
    "circadian_all_handed_over": _night(handover=1.0),
    "circadian_larger_steps": _night(wake_batch=8),
    "circadian_nights": NIGHTS,
    "circadian_no_replay": _night(NIGHTS, recent=1.0, scarce_recent=1.0, deep_recent=1.0),
    "circadian_one_night": _night(NIGHTS, rounds=1, recent=0.7),
    "circadian_own_schedules": _night(NIGHTS, cycle=False),
    "circadian_teacher": _night(NIGHTS, teacher=0.3),
    "circadian_anchor": _night(NIGHTS, anchor=0.3, scarce=False, merge=0.0),
    "circadian_dreams": _night(NIGHTS, dream=0.15, scarce=False, merge=0.0),
    "circadian_on_policy": _night(NIGHTS, teacher=0.3, on_policy=0.25),
    "circadian_slots": _night(NIGHTS, slots=16),
}
"""The methods by name; circadian_* change one thing: of circadian down to circadian_nights, of that from there on."""
VARIANTS: Dict[str, Dict[str, Method]] = {
    "naive": {"rewarm": Method(), "constant": Method(schedule="constant")},
    "replay_tuned": {
        **{f"{rate:.0%}": replace(REPLAY, replay=rate) for rate in (0.65, 0.4, 0.8)},
        **{f"{rate:.0%} balanced": replace(REPLAY, replay=rate, balance=0.5, joins=16) for rate in (0.65, 0.8, 0.9)},
        "65% joining": replace(REPLAY, replay=0.65, joins=16),
    },
    "replay_merged": {f"{weight:g}": replace(REPLAY, merge=weight) for weight in (0.25, 0.1)},
    "replay_balanced": {f"{power:g}": replace(REPLAY, balance=power) for power in (0.5, 1.0)},
    "der": {f"{weight:g}": replace(REPLAY, der=weight) for weight in (0.3, 0.1, 0.03)},
    "ewc": {f"{strength:g}": Method(ewc=strength) for strength in (0.1, 0.01, 1.0)},
    "lwf": {f"{weight:g}": Method(lwf=weight) for weight in (0.3, 0.6, 0.85)},
    "ema": {"ema 0.99": Method(ema=0.99), "ema 0.998": Method(ema=0.998), "merge": Method(merge=0.5)},
    "mer": {f"{step:g}": replace(REPLAY, reptile=step) for step in (0.7, 0.3)},
    "lora": {f"rank {rank}": Method(lora=rank) for rank in (16, 64)},
}
"""Settings that tuning tries at a method's best step size; step sizes are tried with the first."""
