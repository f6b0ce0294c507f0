"""Expert slots: low-rank updates of a level's MLPs, preallocated and masked, filled asleep one by one, folded back.

Expansion in the sleep paper adds a low-rank expert {A, B} to the receiver's MLP. Here a slot is one such pair for each
of the MLP's two matrices, inside of its nonlinearity:

    h = sqrelu(W_up x + sum_s g_s B_s A_s x),    y = W_down h + sum_s g_s B'_s A'_s h

so that a slot whose gate g_s is constant can be folded exactly: W <- W + g_s B_s A_s, up to rounding. With top_k = 0
the gate of every active slot is 1, and folding is exact. With a router (top_k > 0) the gate depends on the token;
folding then takes the constant that is nearest in the least-squares sense on given tokens, and reports what that costs.

Shapes: B batch, T tokens, S slots, D model width, W MLP width, R rank, I inputs, O outputs, V vocabulary.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nl_model.model import LevelMLP, NestedLM, linear
from nl_model.pointwise import squared_relu


@dataclass(frozen=True)
class SlotConfig:
    """How many slots an MLP that may receive gets, and how they are chosen."""

    slots: int = 4
    """Slots per MLP, preallocated; activating one changes no shape."""
    rank: int = 8
    """Rank of a slot's updates."""
    top_k: int = 0
    """Most slots that fire for a token; 0: no router, every active slot counts in full and folding is exact."""

    def __post_init__(self) -> None:
        for key, bound in (("slots", 1), ("rank", 1), ("top_k", 0)):
            if getattr(self, key) < bound:
                raise ValueError(f"slots.{key}={getattr(self, key)} must be at least {bound}")


class LowRank(nn.Module):
    """gate * B A x: (B, T, I) -> (B, T, O), a low-rank update of a linear map."""

    def __init__(self, inputs: int, outputs: int, rank: int, like: Tensor) -> None:
        super().__init__()
        where: Dict[str, Any] = {"bias": False, "device": like.device, "dtype": like.dtype}
        self.a = nn.utils.skip_init(nn.Linear, inputs, rank, **where)
        self.b = nn.utils.skip_init(nn.Linear, rank, outputs, **where)

    def forward(self, x_BTI: Tensor, gate: Tensor) -> Tensor:
        """The update with a gate per token (B, T, 1), or one for all."""
        return self.b(self.a(x_BTI) * gate)

    def product(self) -> Tensor:
        """B A (O, I), in float32 at least."""
        exact = torch.promote_types(self.a.weight.dtype, torch.float32)
        return self.b.weight.to(exact) @ self.a.weight.to(exact)


class Slot(nn.Module):
    """One expert: its updates of both matrices, and its row of the router."""

    def __init__(self, mlp: LevelMLP, cfg: SlotConfig) -> None:
        super().__init__()
        like = mlp.up.weight
        width, dim = like.shape
        self.up = LowRank(dim, width, cfg.rank, like)
        self.down = LowRank(width, dim, cfg.rank, like)
        self.router = nn.utils.skip_init(nn.Linear, dim, 1, device=like.device, dtype=like.dtype) if cfg.top_k else None
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Forget everything."""
        for parameter in self.parameters():
            parameter.zero_()

    @torch.no_grad()
    def draw(self, generator: torch.Generator, spread: bool) -> None:
        """Begin anew: A at random, B zero; the router's row zero, or at random where several slots begin together."""
        self.reset()
        drawn = [self.up.a.weight, self.down.a.weight]
        if spread and self.router is not None:
            drawn.append(self.router.weight)
        for weight in drawn:
            values = torch.empty(weight.shape).normal_(0.0, weight.size(1) ** -0.5, generator=generator)
            weight.copy_(values)


class SlottedMLP(LevelMLP):
    """A level's MLP with slots beside its matrices. While none is active it computes what the MLP alone does."""

    def __init__(self, mlp: LevelMLP, cfg: SlotConfig) -> None:
        nn.Module.__init__(self)
        self.up, self.down, self.cfg = mlp.up, mlp.down, cfg
        self.slots = nn.ModuleList(Slot(mlp, cfg) for _ in range(cfg.slots))
        self.active_S: Tensor
        self.register_buffer("active_S", torch.zeros(cfg.slots, dtype=torch.bool, device=mlp.up.weight.device))

    def forward(self, x_BTD: Tensor, weights: Optional[Tuple[Tensor, Tensor]] = None) -> Tensor:
        """As `LevelMLP.forward`; weights that are given replace the MLP's own, the slots stay."""
        gates = self.gates(x_BTD)
        up_BTW = self.up(x_BTD) if weights is None else linear(x_BTD, weights[0])
        for slot, gate in zip(self.slots, gates, strict=True):
            up_BTW = up_BTW + slot.up(x_BTD, gate)  # type: ignore[operator]
        h_BTW = squared_relu(up_BTW)
        y_BTD = self.down(h_BTW) if weights is None else linear(h_BTW, weights[1])
        for slot, gate in zip(self.slots, gates, strict=True):
            y_BTD = y_BTD + slot.down(h_BTW, gate)  # type: ignore[operator]
        return y_BTD

    def plain(self) -> LevelMLP:
        """The MLP without its slots; it shares the matrices."""
        mlp = LevelMLP.__new__(LevelMLP)
        nn.Module.__init__(mlp)
        mlp.up, mlp.down = self.up, self.down
        return mlp

    def gates(self, x_BTD: Tensor) -> Sequence[Tensor]:
        """One gate per slot: a number where there is no router, (B, T, 1) where there is.

        The base always counts and scores 0. A slot fires where its score is not below that and among the top_k highest;
        its gate is the sigmoid of the score. A slot that begins scores 0: it fires everywhere, but behind every other
        slot that fires, so that activating it changes nothing as long as its B is zero.
        """
        if not self.cfg.top_k:
            return self.active_S.to(x_BTD.dtype).unbind()
        score_BTS = torch.cat([slot.router(x_BTD) for slot in self.slots], dim=-1)  # type: ignore[operator]
        score_BTS = score_BTS.to(torch.promote_types(score_BTS.dtype, torch.float32))
        fires_BTS = (score_BTS >= 0) & self.active_S
        if self.cfg.top_k < self.cfg.slots:
            ranked_BTS = score_BTS.detach().masked_fill(~fires_BTS, -torch.inf)
            best_BTK = ranked_BTS.argsort(dim=-1, descending=True, stable=True)[..., : self.cfg.top_k]
            fires_BTS = fires_BTS & torch.zeros_like(fires_BTS).scatter(-1, best_BTK, True)
        gate_BTS = torch.where(fires_BTS, score_BTS.sigmoid(), 0.0).to(x_BTD.dtype)
        return gate_BTS.split(1, dim=-1)


@dataclass(frozen=True)
class FoldReport:
    """What folding did to a model."""

    gates: Dict[str, float]
    """The constant that stands for each folded update's gate, by its name."""
    divergence: Optional[float] = None
    """Mean KL(before || after) in nats per token on the given tokens; None where none were given."""


def add_slots(model: NestedLM, levels: Iterable[str], cfg: SlotConfig) -> NestedLM:
    """Give every MLP of some levels slots, all inactive; in place, and the model's own parameters keep their names.

    Raises:
        ValueError: the model has no such level, or it has slots already.
    """
    for level in levels:
        if level not in model.level_names:
            raise ValueError(f"level {level!r} cannot get slots; the model's levels are {', '.join(model.level_names)}")
        if slotted(model, level):
            raise ValueError(f"level {level!r} has slots already; fold and remove them first")
        for mlps in _mlps(model):
            if level in mlps:
                mlps[level] = SlottedMLP(cast(LevelMLP, mlps[level]), cfg)
    return model


def remove_slots(model: NestedLM) -> NestedLM:
    """Take all slots out again, in place. They must be inactive (folded or reset)."""
    for mlps in _mlps(model):
        for level, mlp in mlps.items():
            if isinstance(mlp, SlottedMLP):
                assert not bool(mlp.active_S.any()), f"a slot of level {level} is active: fold or reset it first"
                mlps[level] = mlp.plain()
    return model


def slotted(model: NestedLM, level: str) -> Dict[str, SlottedMLP]:
    """A level's MLPs that have slots, by name, lowest block first."""
    found = {f"blocks.{i}.levels.{level}": mlps[level] for i, mlps in enumerate(_mlps(model)) if level in mlps}
    return {name: mlp for name, mlp in found.items() if isinstance(mlp, SlottedMLP)}


def _mlps(model: NestedLM) -> List[nn.ModuleDict]:
    """Every block's MLPs by level."""
    return [cast(nn.ModuleDict, block.levels) for block in model.blocks]


def slot_parameters(model: NestedLM, level: str, index: int) -> List[str]:
    """Names of the parameters of one slot in all MLPs of a level: what a consolidation round trains."""
    return [
        f"{m}.slots.{index}.{n}"
        for m, mlp in slotted(model, level).items()
        for n, _ in mlp.slots[index].named_parameters()
    ]


def active_slots(model: NestedLM, level: str) -> List[int]:
    """Numbers of a level's active slots."""
    mlp = next(iter(slotted(model, level).values()), None)
    return [] if mlp is None else [i for i, on in enumerate(mlp.active_S.tolist()) if on]


def activate(model: NestedLM, level: str, index: int, seed: int, spread: bool = False) -> List[str]:
    """Begin a slot anew in all MLPs of a level; the model computes what it did before, until the slot is trained.

    Args:
        seed: its A is a function of this seed and its name.
        spread: draw the router's row too, so that slots which begin together divide the tokens among them.

    Returns:
        The names of its parameters.
    """
    for name, mlp in slotted(model, level).items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{index}".encode()))
        mlp.slots[index].draw(generator, spread)  # type: ignore[operator]
        mlp.active_S[index] = True
    return slot_parameters(model, level, index)


def reset_slots(model: NestedLM, level: str) -> None:
    """Forget all slots of a level: what a sender does once the receiver knows (pruning, in the paper's words)."""
    for mlp in slotted(model, level).values():
        mlp.active_S.fill_(False)
        for slot in mlp.slots:
            slot.reset()  # type: ignore[operator]


@torch.no_grad()
def fold(model: NestedLM, level: str, tokens_BT: Optional[Tensor] = None) -> FoldReport:
    """Add a level's active slots to the matrices of its MLPs and free them: the size of the model stays bounded.

    Exact up to rounding without a router. With one, a gate becomes the constant c that minimises
    E |g B A x - c B A x|^2 over the given tokens, c = E[g |B A x|^2] / E[|B A x|^2].

    Args:
        tokens_BT: int64 tokens to measure gates and the divergence on.

    Raises:
        ValueError: there is a router and no tokens were given.
    """
    active, mlps = active_slots(model, level), slotted(model, level)
    if tokens_BT is None and active and next(iter(mlps.values())).cfg.top_k:
        raise ValueError(
            f"level {level!r} has routed slots, whose gates differ by token; give tokens to measure them on"
        )
    before_BTV = None if tokens_BT is None else model(tokens_BT)
    updates = {
        f"{name}.slots.{index}.{part}": (mlp, getattr(mlp.slots[index], part), part)
        for name, mlp in mlps.items()
        for index in active
        for part in ("up", "down")
    }
    gates = {name: 1.0 for name in updates}
    if tokens_BT is not None and any(mlp.cfg.top_k for mlp in mlps.values()):
        gates = _constant_gates(model, {name: update for name, (_, update, _) in updates.items()}, tokens_BT)
    for name, (mlp, update, part) in updates.items():
        weight = getattr(mlp, part).weight
        weight.copy_(weight + gates[name] * update.product())
    reset_slots(model, level)
    if before_BTV is None or tokens_BT is None:
        return FoldReport(gates)
    after_BTV = model(tokens_BT)
    exact = torch.promote_types(before_BTV.dtype, torch.float32)
    log_before, log_after = (F.log_softmax(x.to(exact), dim=-1) for x in (before_BTV, after_BTV))
    divergence = F.kl_div(log_after, log_before, reduction="none", log_target=True).sum(-1).mean()
    return FoldReport(gates, float(divergence))


def _constant_gates(model: NestedLM, updates: Dict[str, LowRank], tokens_BT: Tensor) -> Dict[str, float]:
    """The least-squares constant of every update's gate; 0 where an update does nothing anyway."""
    sums = {name: [0.0, 0.0] for name in updates}

    def watch(name: str, module: nn.Module, arguments: Tuple[Tensor, Tensor], _: Tensor) -> None:
        x_BTI, gate_BT1 = arguments
        square_BTO = module.b(module.a(x_BTI)).square()  # type: ignore[operator]
        sums[name][0] += float((gate_BT1 * square_BTO).sum())
        sums[name][1] += float(square_BTO.sum())

    def hook(name: str) -> Any:
        return lambda module, arguments, output: watch(name, module, arguments, output)

    handles = [update.register_forward_hook(hook(name)) for name, update in updates.items()]
    model(tokens_BT)
    for handle in handles:
        handle.remove()
    return {name: part / whole if whole else 0.0 for name, (part, whole) in sums.items()}
