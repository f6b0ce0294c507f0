"""A student model inside a DeepSpeed engine: ZeRO 0 to 3, gloo or NCCL, one rank per process."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from cluster.pool.sharded_muon import ShardedMuon
from nl_model.config import OptimizerConfig
from nl_model.model import NestedLM
from nl_model.optim.levelwise import build_optimizer
from nl_model.optim.moments import blank_state, counters_of, moments_in
from pipelines.config.pool import PoolConfig
from pipelines.sleep.engine import TrainingState

# DeepSpeed's autotuner, unused here, would import MLflow where it is installed: two seconds for every rank.
hidden = "mlflow" not in sys.modules
if hidden:
    sys.modules["mlflow"] = None  # type: ignore[assignment]
import deepspeed  # noqa: E402
from deepspeed.utils import (  # noqa: E402
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

if hidden:
    del sys.modules["mlflow"]


def join_group(rank: int, world: int, address: str, port: int, backend: str, timeout: float) -> None:
    """Rendezvous of one rank. Errors of torch.distributed pass through; a silent peer is given up after `timeout` s."""
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0")
    # Training never uses DeepSpeed's shared-memory op; left on, every CPU host compiles it at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        backend,
        auto_mpi_discovery=False,
        timeout=timedelta(seconds=timeout),
        verbose=False,
        rank=rank,
        world_size=world,
    )


def pick_backend(backend: str, device: torch.device) -> str:
    """nccl on a GPU, gloo elsewhere, unless the configuration names one."""
    if backend != "auto":
        return backend
    return "nccl" if device.type == "cuda" else "gloo"


class DeepSpeedEngine:
    """Trains a model with ZeRO (`pipelines.sleep.engine.Engine`).

    Args:
        model: float32, on its device, identical on all ranks.
        optimizer: settings of the pool's optimizer.
        pool: stage, precision of the weights, passes per step, activation checkpointing.
        share: sequences per rank and step.
        frozen: names of parameters to leave as they are.
        state: what to take the moments from; its weights are the caller's to load into the model.
    """

    def __init__(
        self,
        model: NestedLM,
        optimizer: OptimizerConfig,
        pool: PoolConfig,
        share: int,
        frozen: Iterable[str] = (),
        state: Optional[TrainingState] = None,
    ) -> None:
        kept = set(frozen)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in kept)
        model.checkpointing = pool.activation_checkpointing
        self.stage, self.bf16, self.passes = pool.zero_stage, pool.bf16_weights, pool.passes(share)
        self.pending = 0
        """Passes since the last write."""
        # DeepSpeed's norm is summed in another order than torch's. Where every rank holds whole gradients, torch's is
        # used, so that one rank without ZeRO computes the same bits as one process without DeepSpeed.
        self.clip = 0.0 if self.stage else optimizer.clip
        self.names = [name for name, _ in model.named_parameters()]
        parameters = [p for p in model.parameters() if p.requires_grad]
        # DeepSpeed rounds the weights before it copies its masters: these are what they were.
        exact = {n: p.detach().clone() for n, p in model.named_parameters()} if self.bf16 else {}
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=model,
            optimizer=_optimizer(parameters, optimizer, model, self.stage),
            model_parameters=parameters,
            config=_settings(optimizer.clip - self.clip, pool, share // self.passes, self.passes, parameters),
        )
        self.shards: Dict[Parameter, Tensor] = {}
        """Under ZeRO 1 and 2: this rank's flat part of each parameter's group."""
        if self.stage in (1, 2):
            zero = self.engine.optimizer
            for group, shard in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                self.shards.update(dict.fromkeys(group, shard))
        self.frozen = {name: exact[name] for name in kept if self.bf16}
        for name, parameter in self._trained() if self.bf16 else ():
            self._set_master(parameter, exact[name])
        if isinstance(self._inner, ShardedMuon):
            self._inner.bind()
            self._link_moments()
        if state is not None:
            self._load_moments(state)

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        return self.engine(tokens_BT)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one pass; after the last one it is averaged over the ranks."""
        if self.pending:
            self.engine.step()  # between two passes this only counts
        self.engine.backward(loss)
        self.pending += 1

    def step(self, lr: float) -> None:
        """After the last pass: clip and write with step size `lr`."""
        assert self.pending == self.passes, f"{self.pending} of {self.passes} passes were made"
        self.pending = 0
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        if self.clip:
            torch.nn.utils.clip_grad_norm_([p for _, p in self._trained()], self.clip)
        self.engine.step()

    def weights(self) -> Iterator[Tuple[str, Tensor]]:
        """Full float32 parameters by name, gathered one at a time. A collective: every rank must walk through all."""
        for name, parameter in self._parameters():
            if self.bf16:
                whole = safe_get_full_fp32_param(parameter) if parameter.requires_grad else self.frozen[name]
                yield name, whole.detach().cpu().clone()
            else:
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                    yield name, parameter.detach().cpu().clone()

    def state(self, weights: bool = True) -> Iterator[Tuple[str, Tensor]]:
        """`weight/NAME` (if wanted) and `MOMENT/NAME`, full and float32, one at a time. A collective like `weights`."""
        if weights:
            yield from ((f"weight/{name}", tensor) for name, tensor in self.weights())
        for name, parameter in self._trained():
            held: Dict[str, Any] = self._inner.state.get(self._shard_of(parameter), {})
            for moment in moments_in(held):  # the same on every rank; none before the first step
                whole = safe_get_full_optimizer_state(parameter, moment) if self.stage else held[moment]
                yield f"{moment}/{name}", whole.detach().cpu().clone()

    def counters(self) -> Dict[str, float]:
        """The optimizer's own counters, which are the same for all parameters that have them."""
        return counters_of(self._inner)

    def optimizer_bytes(self) -> int:
        """Bytes of optimizer state that this rank holds (moments and fp32 copies of its shard)."""
        seen: Dict[int, int] = {}
        for tensor in (v for s in self._inner.state.values() for v in s.values()):
            if torch.is_tensor(tensor) and tensor.numel() > 1:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(seen.values())

    def close(self) -> None:
        """Free the engine's hooks and buffers."""
        self.engine.destroy()

    @property
    def _inner(self) -> Any:
        """The torch optimizer inside ZeRO's."""
        return getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)

    def _parameters(self) -> Iterator[Tuple[str, Parameter]]:
        return zip(self.names, self.engine.module.parameters(), strict=True)

    def _trained(self) -> Iterator[Tuple[str, Parameter]]:
        return ((name, parameter) for name, parameter in self._parameters() if parameter.requires_grad)

    def _shards(self) -> Iterator[Tuple[Dict[str, Any], Tensor]]:
        """What the torch optimizer steps, parameters or this rank's flat parts of them, each with its group."""
        groups: List[Dict[str, Any]] = self._inner.param_groups
        if self.stage == 3:  # here groups are put together anew at every step; all have the same settings
            return ((groups[0], shard) for shard in self.engine.optimizer.fp32_partitioned_groups_flat)
        return ((group, shard) for group in groups for shard in group["params"])

    def _shard_of(self, parameter: Parameter) -> Tensor:
        """What the torch optimizer steps of a parameter's group, whether this rank has a part of it or not."""
        if not self.stage:
            return parameter
        zero = self.engine.optimizer
        if self.stage == 3:  # the moments of all are alike
            shard: Tensor = zero.fp32_partitioned_groups_flat[0]
            return shard
        return self.shards[parameter]

    def _link_moments(self) -> None:
        """Under ZeRO 1 and 2, let the moments of parameters be found; DeepSpeed does it after the first step."""
        if self.stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _local(self, parameter: Parameter, whole: Tensor) -> Tensor:
        """This rank's part of a parameter under ZeRO 3."""
        return equal_part(whole, safe_get_local_fp32_param(parameter).numel(), torch.distributed.get_rank())

    def _set_master(self, parameter: Parameter, whole: Tensor) -> None:
        if self.stage == 3:
            safe_set_local_fp32_param(parameter, self._local(parameter, whole))
        else:
            safe_set_full_fp32_param(parameter, whole)

    def _load_moments(self, state: TrainingState) -> None:
        """Give the optimizer the moments and counters of a state; parameters it knows nothing of start with none."""
        moments, inner = state.moments(), self._inner
        for group, shard in self._shards():
            for key, blank in blank_state(group, shard, moments, state.counters).items():
                inner.state[shard].setdefault(key, blank).copy_(blank)  # in place: what is linked stays linked
        self._link_moments()
        for name, parameter in self._trained():
            for moment in moments_in(inner.state.get(self._shard_of(parameter), {})):
                whole = state.get(f"{moment}/{name}")
                if whole is not None:
                    self._set_moment(parameter, whole.to(parameter.device), moment)

    def _set_moment(self, parameter: Parameter, whole: Tensor, moment: str) -> None:
        if self.stage == 3:
            safe_set_local_optimizer_state(parameter, self._local(parameter, whole), moment)
        elif self.stage:
            safe_set_full_optimizer_state(parameter, whole, moment)
        else:
            self._inner.state[parameter][moment].copy_(whole)


def equal_part(whole: Tensor, size: int, rank: int) -> Tensor:
    """Numbers rank * size to (rank + 1) * size of a flattened tensor, zeros behind its end: how ZeRO 3 cuts."""
    part = whole.flatten()[rank * size : (rank + 1) * size]
    return F.pad(part, (0, size - part.numel()))


def _optimizer(parameters: List[Parameter], cfg: OptimizerConfig, model: NestedLM, stage: int) -> torch.optim.Optimizer:
    """What a configuration names, fit for the shards that a stage will put into its hands."""
    if cfg.name == "muon" and stage in (1, 2):
        return ShardedMuon.configured(parameters, cfg, model)
    return build_optimizer(parameters, cfg, model)


def _settings(
    clip: float, pool: PoolConfig, micro_batch: int, passes: int, parameters: List[Parameter]
) -> Dict[str, Any]:
    """DeepSpeed's configuration."""
    # It allocates whole buckets (2 GB by default), and deterministic mode fills them at every step.
    bucket = min(500_000_000, sum(p.numel() for p in parameters))
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": clip,
        "zero_optimization": {
            "stage": pool.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "bf16": {"enabled": pool.bf16_weights},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
