"""How the consolidation pool shards and steps its student: part of the configuration of a run."""

from __future__ import annotations

from dataclasses import dataclass

from nl_model.checks import above, at_least, must, one_of


@dataclass(frozen=True)
class PoolConfig:
    """The consolidation pool: DeepSpeed ranks that sleep together."""

    ranks: int = 2
    """Number of DeepSpeed ranks; a run may be continued with another number."""
    zero_stage: int = 2
    """ZeRO stage of the student: 0, 1, 2 or 3; a run may be continued with another one."""
    backend: str = "auto"
    """Collectives: gloo, nccl, or auto (nccl where every rank has a GPU)."""
    micro_batch: int = 0
    """Sequences per pass of a rank; gradients are summed until its share of a step is through. 0: all in one pass."""
    activation_checkpointing: bool = False
    """Keep only what enters the student's blocks, and compute the rest again in the backward pass."""
    bf16_weights: bool = False
    """Compute with bf16 copies of the student's weights, and step fp32 masters, instead of fp32 under autocast."""
    checkpoint_every: int = 0
    """Steps between training states, from which a repeated attempt of a round goes on; 0: it begins anew."""
    release_after_round: bool = False
    """Give the pool's processes back after every round, and start them anew for the next."""
    timeout: float = 60.0
    """Seconds after which a silent collective is given up."""
    start_timeout: float = 120.0
    """Seconds to wait for the pool's processes to be placed and started."""

    def __post_init__(self) -> None:
        at_least("pool.ranks", self.ranks, 1)
        at_least("pool.micro_batch", self.micro_batch, 0)
        at_least("pool.checkpoint_every", self.checkpoint_every, 0)
        must("pool.zero_stage", self.zero_stage, self.zero_stage in (0, 1, 2, 3), "be 0, 1, 2 or 3")
        above("pool.timeout", self.timeout, 0)
        above("pool.start_timeout", self.start_timeout, 0)
        if self.bf16_weights and not self.zero_stage:
            raise ValueError("pool.bf16_weights=true needs fp32 masters, which ZeRO keeps; give pool.zero_stage=1 to 3")
        one_of("pool.backend", self.backend, ("auto", "gloo", "nccl"))

    def passes(self, share: int) -> int:
        """Passes of a rank over its share of a step, in sequences."""
        return share // self.micro_batch if self.micro_batch else 1

    def check_optimizer(self, name: str) -> None:
        """ValueError unless the stage leaves whole matrices to an optimizer that needs them (sleep.optimizer.name)."""
        if name == "muon" and self.zero_stage == 3:
            raise ValueError(
                "sleep.optimizer.name=muon writes whole matrices, and pool.zero_stage=3 cuts every one of them up; "
                "use pool.zero_stage=0, 1 or 2, or sleep.optimizer.name=adamw"
            )

    def check(self, sleep_batch: int, base_batch: int, precision: str) -> None:
        """ValueError unless batches divide as they must and the precisions go together.

        Args:
            sleep_batch: sequences per step over all ranks (sleep.batch).
            base_batch: sequences per step of pretraining over all ranks (base.batch).
            precision: compute.precision.
        """
        for key, batch in (("sleep.batch", sleep_batch), ("base.batch", base_batch)):
            share, rest = divmod(batch, self.ranks)
            if rest:
                raise ValueError(f"{key}={batch} must be a multiple of pool.ranks={self.ranks}")
            if self.micro_batch and share % self.micro_batch:
                raise ValueError(
                    f"{key} / pool.ranks={share} must be a multiple of pool.micro_batch={self.micro_batch}"
                )
        if self.bf16_weights and precision != "bf16":
            raise ValueError("pool.bf16_weights=true computes in bf16; give compute.precision=bf16 as well")
