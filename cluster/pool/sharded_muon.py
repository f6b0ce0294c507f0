"""Muon where ZeRO 1 or 2 hands the optimizer flat shards: the same steps as Muon on whole matrices, up to rounding.

DeepSpeed joins the parameters of a group into one flat vector and gives every rank an equal part of it, which begins
and ends in the middle of matrices. Muon's direction is a function of a whole matrix (Eq. 42), so the ranks that share
one exchange what is to be orthogonalised. That is a matrix per boundary between two ranks at most, not the model: all
others lie on one rank. Momentum, weight decay and AdamW go number by number and need no one else.

DeepSpeed's own Muon is not used. It orthogonalises in half precision inside torch.compile, puts nothing but its result
where the gradient was before clipping, and keeps other state; one process would compute something else than a pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Iterable, Iterator, List, Tuple

import torch
from torch import Tensor
from torch.nn import Parameter

from nl_model.optim.adamw import accumulator
from nl_model.optim.moments import ADAMW_MOMENTS, blank_state
from nl_model.optim.muon import Muon


@dataclass(frozen=True)
class Fragment:
    """A rank's part of one matrix."""

    shape: torch.Size
    """Of the whole matrix."""
    begin: int
    """First number of the part, counted in the matrix."""
    size: int
    """Numbers in the part; 0: another rank has it all."""
    place: int
    """First number of the part, counted in the rank's shard."""

    @classmethod
    def of(cls, parameter: Parameter) -> Fragment:
        """As DeepSpeed has laid it out, padding, order and all."""
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return cls(parameter.shape, 0, 0, 0)
        inside, place = mapping.lp_fragment_address, mapping.hp_fragment_address
        return cls(parameter.shape, inside.start, inside.numel, place.start)

    def within(self, shard: Tensor) -> Tensor:
        """The part, as a view of a flat shard."""
        return shard.narrow(0, self.place, self.size)

    def part(self, whole: Tensor) -> Tensor:
        """The part, cut out of the whole matrix."""
        return whole.flatten().narrow(0, self.begin, self.size)


class Layout:
    """Where the matrices of a group lie. Made by all ranks together.

    Args:
        matrices: of the group, in the same order on all ranks.
        device: where small tensors can be exchanged.
    """

    def __init__(self, matrices: List[Parameter], device: torch.device) -> None:
        self.process_group: Any = matrices[0]._dp_group  # type: ignore[attr-defined]
        found = [Fragment.of(matrix) for matrix in matrices]
        sizes = torch.tensor([[fragment.size, fragment.size > 0] for fragment in found], device=device)
        torch.distributed.all_reduce(sizes, group=self.process_group)
        held: List[Tuple[int, int]] = [(int(size), int(ranks)) for size, ranks in sizes.tolist()]
        assert [size for size, _ in held] == [m.numel() for m in matrices], "the parts do not add up to the matrices"
        pairs = list(zip(found, held, strict=True))
        self.mine = [fragment for fragment, (_, ranks) in pairs if ranks == 1 and fragment.size]
        """Matrices that lie on this rank alone."""
        self.shared = [fragment for fragment, (_, ranks) in pairs if ranks > 1]
        """Matrices that lie on several ranks, whether this is one of them or not."""

    def whole(self, shard: Tensor) -> Iterator[Tuple[Fragment, Tensor]]:
        """The whole of every matrix that this rank has a part of. A collective, which is over when the first comes.

        Args:
            shard: this rank's numbers.
        """
        sizes = [fragment.shape.numel() for fragment in self.shared]
        joined = shard.new_zeros(sum(sizes))
        for fragment, flat in zip(self.shared, joined.split(sizes), strict=True):
            fragment.part(flat).copy_(fragment.within(shard))
        if self.shared:  # the parts do not overlap: adding zeros rounds nothing
            torch.distributed.all_reduce(joined, group=self.process_group)
        return self._views(shard, joined.split(sizes))

    def _views(self, shard: Tensor, shared: Iterable[Tensor]) -> Iterator[Tuple[Fragment, Tensor]]:
        for fragment in self.mine:
            yield fragment, fragment.within(shard).view(fragment.shape)
        for fragment, flat in zip(self.shared, shared, strict=True):
            if fragment.size:
                yield fragment, flat.view(fragment.shape)


class ShardedMuon(Muon):
    """Muon inside DeepSpeed's ZeRO 1 or 2 optimizer. To be built over whole parameters, like Muon.

    DeepSpeed puts its flat shard into the place of each group's parameters; call `bind` then. The group of matrices and
    the group of all else are two shards, so each has the moments that Muon keeps of its parameters, no others. Every
    rank steps the groups in the same order, and so the collectives of `Layout.whole` meet.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.whole: List[List[Parameter]] = [list(group["params"]) for group in self.param_groups]
        """Parameters by group, as they were before they were sharded."""
        self.layouts: Dict[Tensor, Layout] = {}
        """Of the shards of matrices."""

    def bind(self) -> None:
        """Learn the layout of the shards, and make their state. A collective.

        DeepSpeed looks for the moments of all groups after it has stepped the first, hence not at the first step.
        """
        for group, parameters in zip(self.param_groups, self.whole, strict=True):
            (shard,) = group["params"]
            self.state[shard] = blank_state(group, shard, ("momentum", *ADAMW_MOMENTS), {"step": 0.0})
            if group["matrix"]:
                self.layouts[shard] = Layout(parameters, shard.device)

    def write_matrix(self, parameter: Parameter, group: Dict[str, Any]) -> None:
        """Write this rank's parts of the matrices; `parameter` is its flat shard."""
        assert parameter.grad is not None and parameter in self.layouts, "bind was not called"
        ahead = self.ahead(parameter.grad.to(accumulator(parameter)), self.state[parameter], group)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        for fragment, matrix in self.layouts[parameter].whole(ahead):
            direction = self.orthogonal(matrix, group)
            fragment.within(parameter).add_(fragment.part(direction), alpha=-group["lr"])
