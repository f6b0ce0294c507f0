"""What of a student trains asleep: all of it, the receivers' own weights, or new expert slots in them.

sleep.mode=all trains every level. In the other two a level receives what faster ones know, as in the sleep paper: only
its weights (dense), or only new low-rank slots in its MLPs (slots), change; everything else stays to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, List, Mapping, Optional, Sequence

from torch import Tensor

from nl_model.clock import LevelClock
from nl_model.config import LevelConfig
from nl_model.flops import full_step_flops, sleep_step_flops
from nl_model.model import NestedLM
from nl_model.slots import FoldReport, SlotConfig, activate, add_slots, fold, remove_slots, slotted
from nl_model.weights import load_into
from pipelines.config.sleep import SleepConfig


@dataclass(frozen=True)
class Expansion:
    """Who receives in a round, and what of the student trains."""

    receivers: Sequence[str] = ()
    """Levels that receive; empty where all levels train."""
    frozen: List[str] = field(default_factory=list)
    """Parameters that stay as they are."""


def slot_config(cfg: SleepConfig) -> SlotConfig:
    """The slots that sleep.* asks for."""
    return SlotConfig(cfg.slots, cfg.slot_rank, cfg.slot_top_k)


def receivers_due(levels: Dict[str, LevelConfig], before: int, after: int) -> List[str]:
    """Levels of the pool with a boundary in (before, after] tokens, fastest first; all of them where none has one.

    A stream ends where it ends: its last round is due though no period is over.
    """
    clock = LevelClock.of(levels, owner="pool")
    return list(clock.due(before, after)) or list(clock.periods)


def expand(student: NestedLM, receivers: Sequence[str], cfg: SleepConfig, seed: int) -> Expansion:
    """Prepare a student for training, in place; with slots its receivers get them, and what it computes stays.

    Args:
        receivers: levels that receive.
        cfg: its mode and slots.
        seed: of the new slots.
    """
    if cfg.mode == "all":
        return Expansion()
    if cfg.mode == "slots":
        add_slots(student, receivers, slot_config(cfg))
        spread = cfg.slots > 1
        trained = [n for r in receivers for i in range(cfg.slots) for n in activate(student, r, i, seed, spread)]
    else:
        trained = [name for receiver in receivers for name in student.parameters_of(receiver)]
    kept = set(trained)
    return Expansion(tuple(receivers), [name for name, _ in student.named_parameters() if name not in kept])


def folded(
    model: NestedLM,
    trained: Mapping[str, Tensor],
    expansion: Expansion,
    cfg: SleepConfig,
    seed: int,
    tokens_BT: Optional[Tensor] = None,
) -> FoldReport:
    """Load trained weights into a plain model, their slots folded: a release looks the same in every mode.

    Args:
        model: of the student's shape, without slots; overwritten.
        trained: all parameters of the trained student by name.
        expansion: what `expand` returned for the student.
        cfg, seed: the same as for `expand`.
        tokens_BT: int64 tokens that gates are measured on, the same on every rank.

    Returns:
        The worst of the folds.
    """
    expand(model, expansion.receivers, cfg, seed)
    load_into(model, trained)
    worst = FoldReport({}, 0.0)
    for receiver in (r for r in expansion.receivers if slotted(model, r)):
        report = fold(model, receiver, tokens_BT)
        worst = max(worst, report, key=lambda r: r.divergence or 0.0)
    remove_slots(model)
    return worst


def student_step_flops(model: NestedLM, expansion: Expansion, cfg: SleepConfig) -> int:
    """FLOPs per token of one step of a student, forward and backward, guides apart."""
    shape = (model.cfg, model.level_configs, model.vocab_size)
    if not expansion.receivers:
        return full_step_flops(*shape)
    rank = cfg.slots * cfg.slot_rank if cfg.mode == "slots" else 0
    return sleep_step_flops(*shape, receivers=expansion.receivers, rank=rank)
