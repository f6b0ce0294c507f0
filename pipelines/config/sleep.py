"""How a consolidation round trains: part of the configuration of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from nl_model.checks import above, at_least, inside, one_of, share
from nl_model.config import DIVERGENCES, OptimizerConfig

SAMPLERS = ("uniform", "recency", "surprise")
GUIDES = ("recompute", "stored")
MIXINGS = ("constant", "linear", "cosine")
MODES = ("all", "dense", "slots")
SCHEDULES = ("cosine", "constant")
CARRIES = ("nothing", "moments", "trainer")


@dataclass(frozen=True)
class ImitationConfig:
    """A reward for continuations that the guide would have given: the imitation part of on-policy steps."""

    weight: float = 0.0
    """Share of the reward in the on-policy objective, the rest is the divergence; 0: no reward, and no samples of the
    guide. Needs sleep.on_policy."""
    semantic: float = 0.5
    """Share of the semantic reward (is the guide content with the text?); the rest is surface (edit distance)."""
    threshold: float = 0.5
    """Nats per token by which the guide may find the student's text less likely than its own and still be content; 0:
    none."""
    cutoff: int = 16
    """Largest edit distance, in tokens, that earns a surface reward; 0: none does."""

    def __post_init__(self) -> None:
        share("sleep.imitation.weight", self.weight)
        share("sleep.imitation.semantic", self.semantic)
        at_least("sleep.imitation.threshold", self.threshold, 0)
        at_least("sleep.imitation.cutoff", self.cutoff, 0)


@dataclass(frozen=True)
class SleepConfig:
    """One consolidation round."""

    mode: str = "all"
    """What trains: all (every level), dense (the receivers' own weights, the levels of the pool whose period is over),
    slots (new low-rank slots in the receivers' MLPs, folded into their weights before the gate)."""
    slots: int = 1
    """slots: slots that a round adds to each MLP of a receiver."""
    slot_rank: int = 16
    """slots: rank of a slot's update of each of the MLP's two matrices."""
    slot_top_k: int = 0
    """slots: most slots that a router lets fire for a token; 0: no router, all count in full and folding is exact."""
    tokens_per_token: float = 0.5
    """Tokens trained on asleep per token streamed awake since the last round; 0: rounds train nothing."""
    epochs: float = 0.0
    """FLOPs of wake and sleep together per streamed token, in full training steps; decides tokens_per_token. 0: that
    key says it."""
    max_steps: int = 0
    """Most steps of one round; 0: no limit."""
    max_queued: int = 4
    """Most rounds that wait for the pool; beyond it the oldest is merged into the next."""
    batch: int = 8
    """Sequences per step over all ranks together."""
    recent: float = 0.2
    """Share of recent experience in a batch; the rest is older experience, replayed."""
    replay_bytes: int = 0
    """Bytes of text (one per token) that replay may hold of the past: a fair sample of all of it. 0: everything."""
    sampler: str = "uniform"
    """How older experience is drawn: uniform, recency, or surprise."""
    balance: float = 0.5
    """0: older experience is drawn as the sampler says. 1: every source equally often; in between, by a power of its
    share. A label that a source has is all that is known of it."""
    half_life: int = 2048
    """Half-life of the recency sampler, in experiences."""
    surprise_cap: float = 3.0
    """Largest weight of one experience in the surprise sampler, in multiples of the mean."""
    source_cap: float = 0.5
    """Largest share of one source among replayed experiences in the surprise sampler."""
    teacher: float = 0.0
    """Weight of distillation from the teacher (the awake model) on recent experience; 0 skips its passes. Guides pay
    where text is missing (sleep.replay_bytes); with all text at hand its own tokens say more."""
    anchor: float = 0.0
    """Weight of distillation from the anchor (the last promoted model) on old experience; 0 skips its passes."""
    mixing: str = "constant"
    """How both weights run over a round: constant, linear (down to 0 at its last step), or cosine (the same, round)."""
    divergence: str = "forward_kl"
    """From a guide: forward_kl, reverse_kl, jsd, or topk (forward_kl on the guide's sleep.top_k tokens and a tail)."""
    jsd_beta: float = 0.5
    """Weight of the guide in the mixture that jsd measures from: near 0 like forward_kl, near 1 like reverse_kl."""
    top_k: int = 32
    """Tokens that a guide names per position, where divergence is topk or guide is stored."""
    guide: str = "recompute"
    """recompute: the teacher reads every batch. stored: it reads recent experience once, its top_k tokens are kept."""
    on_policy: float = 0.0
    """Share of steps in which the student continues its batch itself and is measured on what it said; 0: never."""
    continuation: int = 32
    """Tokens that the student says in such a step."""
    imitation: ImitationConfig = field(default_factory=ImitationConfig)
    """Reward for what the student says in such a step."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-3))
    """Optimizer of the pool over all levels of the student; lr is the peak of sleep.schedule."""
    schedule: str = "constant"
    """Step size: cosine (warmed up and cooled down within every round) or constant (never cooled down: needs
    sleep.average to release something cool)."""
    warmup: int = 20
    """Steps of the warm-up of a constant step size, once in a run."""
    carry: str = "trainer"
    """What a round takes over from the round that made its anchor: nothing (it starts from the release, without
    moments), moments, or trainer (moments and the weights that the release is an average of)."""
    average: int = 50
    """Horizon in steps of the exponential average of weights that is released; 0: the last weights are."""
    average_every: int = 4
    """Steps between two samples of that average."""
    merge: float = 0.0
    """Weight of the anchor's weights in the candidate (it is averaged with what has been trained); pays where the store
    holds little of the past."""

    def __post_init__(self) -> None:
        one_of("sleep.mode", self.mode, MODES)
        at_least("sleep.slots", self.slots, 1)
        at_least("sleep.slot_rank", self.slot_rank, 1)
        at_least("sleep.slot_top_k", self.slot_top_k, 0)
        at_least("sleep.tokens_per_token", self.tokens_per_token, 0)
        at_least("sleep.max_steps", self.max_steps, 0)
        at_least("sleep.max_queued", self.max_queued, 1)
        at_least("sleep.batch", self.batch, 1)
        share("sleep.recent", self.recent)
        one_of("sleep.sampler", self.sampler, SAMPLERS)
        at_least("sleep.half_life", self.half_life, 1)
        at_least("sleep.surprise_cap", self.surprise_cap, 1)
        share("sleep.source_cap", self.source_cap)
        share("sleep.teacher", self.teacher)
        share("sleep.anchor", self.anchor)
        share("sleep.merge", self.merge)
        share("sleep.balance", self.balance)
        at_least("sleep.replay_bytes", self.replay_bytes, 0)
        at_least("sleep.epochs", self.epochs, 0)
        one_of("sleep.schedule", self.schedule, SCHEDULES)
        at_least("sleep.warmup", self.warmup, 1)
        one_of("sleep.carry", self.carry, CARRIES)
        at_least("sleep.average", self.average, 0)
        at_least("sleep.average_every", self.average_every, 1)
        self._check_average()
        self._check_guides()
        above("sleep.optimizer.lr", self.optimizer.lr, 0)
        # ZeRO hands an optimizer flat shards; of those that look at whole matrices, muon alone can work with them.
        one_of("sleep.optimizer.name", self.optimizer.name, ("adamw", "sgd", "muon"))

    def _check_average(self) -> None:
        if self.carry == "trainer" and self.mode == "slots":
            raise ValueError("sleep.carry=trainer goes on with weights that slots are folded into; use sleep.mode=all")
        if self.average and self.mode == "slots":
            raise ValueError(
                f"sleep.average={self.average} averages whole weights; use it with sleep.mode=all or dense"
            )
        if self.average and self.merge:
            raise ValueError(f"sleep.average={self.average} and sleep.merge={self.merge} both average; use one of them")

    def _check_guides(self) -> None:
        one_of("sleep.mixing", self.mixing, MIXINGS)
        one_of("sleep.divergence", self.divergence, (*DIVERGENCES, "topk"))
        inside("sleep.jsd_beta", self.jsd_beta, 0, 1)
        at_least("sleep.top_k", self.top_k, 1)
        one_of("sleep.guide", self.guide, GUIDES)
        share("sleep.on_policy", self.on_policy)
        at_least("sleep.continuation", self.continuation, 1)
        if self.on_policy and not (self.teacher or self.anchor):
            raise ValueError("sleep.on_policy needs a guide; give sleep.teacher or sleep.anchor a weight")
        if self.imitation.weight and not self.on_policy:
            raise ValueError("sleep.imitation.weight rewards on-policy steps only; give sleep.on_policy a share")

    def check_on_policy(self, context: int, zero_stage: int) -> None:
        """ValueError where the student's own continuations fit neither the model's context nor the pool."""
        if self.on_policy and self.continuation > context - 2:
            raise ValueError(
                f"sleep.continuation={self.continuation} leaves no prompt in model.context={context}; "
                f"use at most {context - 2}"
            )
        if self.on_policy and zero_stage == 3:
            raise ValueError("sleep.on_policy samples from whole weights; use pool.zero_stage=2 or less with it")
