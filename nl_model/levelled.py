"""What a model is to its optimizers, stores and releases: parameters that belong to named levels.

Shapes: B batch, T tokens, S sequence length (T + 1), V vocabulary.
"""

from __future__ import annotations

from typing import Dict, List, Self, Tuple

from torch import Tensor, nn

from nl_model.config import LevelConfig, ordered_levels
from nl_model.losses import token_nll


def is_slot(parameter: str) -> bool:
    """Whether a parameter belongs to an expert slot of an MLP (nl_model.slots), which only sleep writes."""
    return "slots" in parameter.split(".")[4:]


class Levelled(nn.Module):
    """A language model whose parameters are partitioned into levels with update periods of their own.

    A subclass gives `forward`, from int64 tokens (B, T) to next-token logits (B, T, V), and `level_of`.
    """

    def __init__(self, levels: Dict[str, LevelConfig]) -> None:
        super().__init__()
        self.level_configs = dict(levels)
        self.level_names: Tuple[str, ...] = tuple(ordered_levels(levels))
        """Fastest first."""
        self.wiring = "sequential"
        """How levels depend on each other (ModelConfig.wiring)."""

    def level_of(self, parameter: str) -> str:
        """Name of the level that a parameter belongs to."""
        raise NotImplementedError

    def nll(self, sequences_BS: Tensor) -> Tensor:
        """Loss per predicted token in nats, float32 (B, S - 1), of int64 sequences (B, S)."""
        return token_nll(self(sequences_BS[:, :-1]), sequences_BS[:, 1:])

    def owned_by(self, owner: str) -> List[str]:
        """Names of the parameters of all levels of one owner (learner or pool), in model order."""
        return [n for n, _ in self.named_parameters() if self.level_configs[self.level_of(n)].owner == owner]

    def parameters_of(self, level: str) -> Dict[str, nn.Parameter]:
        """The parameters that one level's own updates write, by name, in model order; slots are not among them."""
        return {name: p for name, p in self.named_parameters() if self.level_of(name) == level and not is_slot(name)}

    def level_sizes(self) -> Dict[str, int]:
        """Number of parameters per level."""
        sizes = {name: 0 for name in self.level_names}
        for name, parameter in self.named_parameters():
            sizes[self.level_of(name)] += parameter.numel()
        return sizes

    def train_only(self, owner: str) -> Self:
        """Let gradients reach the levels of one owner only; the backward pass then stops at the lowest such block."""
        owned = {name for name in self.owned_by(owner) if not is_slot(name)}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in owned)
        return self
