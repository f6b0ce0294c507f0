"""The levels of one owner as a state machine over a stream: observe losses, move the clock, write what is due.

Shapes: B sequences, T predicted tokens per sequence, S = T + 1.
"""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor

from nl_model.clock import LevelClock
from nl_model.config import named_levels
from nl_model.levelled import Levelled, is_slot
from nl_model.nested import NestedStarts
from nl_model.optim.levelwise import LevelOptimizers


class OnlineLevels:
    """Learns a stream with a model whose levels are shared by the whole batch.

    A level is constant over its period; the gradients of its tokens are summed at these weights and then applied once
    (Eq. 71, with exactly the tokens of the period). How the stream is cut into calls changes nothing.

    Args:
        model: its parameters outside `names` are left as they are.
        names: levels to write; all of them where None.
        step_tokens: tokens of one learner step, for levels whose period counts steps.
        group: data-parallel ranks; every rank sees its own part of the stream, and the weights stay equal to the bit.
            `step_tokens` and all positions count the tokens of all ranks.
    """

    def __init__(
        self,
        model: Levelled,
        names: Optional[Sequence[str]] = None,
        step_tokens: int = 1,
        group: Optional[dist.ProcessGroup] = None,
    ) -> None:
        self.model, self.group = model, group
        self.names: List[str] = named_levels(model.level_configs, names)
        periods = LevelClock.of(model.level_configs, step_tokens=step_tokens).periods
        self.clock = LevelClock({name: periods[name] for name in self.names})
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(model.level_of(name) in self.names and not is_slot(name))
        self.optimizers = LevelOptimizers(model, self.names)
        self.starts = NestedStarts(model, self.names) if model.wiring == "nested" else None
        self.tokens = 0
        self.ranks = dist.get_world_size(group) if group is not None else 1

    def learn(self, sequences_BS: Tensor) -> Tensor:
        """Score sequences and learn from them in order; returns their loss before learning, (B, T) in nats.

        ValueError for other shapes, and where the fastest period is no multiple of a sequence: weights would have to
        change inside of one (nl_model.streaming does that).
        """
        if sequences_BS.dim() != 2 or not len(sequences_BS) or sequences_BS.size(1) < 2:
            raise ValueError(
                f"sequences have shape {tuple(sequences_BS.shape)}; learn() takes (B, S), B of at least 1, S at least 2"
            )
        T, fastest = sequences_BS.size(1) - 1, min(self.clock.periods.values())
        if fastest % (T * self.ranks):
            raise ValueError(
                f"the fastest period={fastest} tokens is no multiple of the {T * self.ranks} tokens that one sequence "
                "per rank has; use another period or shorter sequences"
            )
        losses, rest_BS = [], sequences_BS
        while len(rest_BS):
            room = (fastest - self.tokens % fastest) // (T * self.ranks)
            part_BS, rest_BS = rest_BS[:room], rest_BS[room:]
            nll_BT = self.model.nll(part_BS)
            self.observe(nll_BT)
            losses.append(nll_BT.detach())
            self.advance(part_BS.size(0) * T * self.ranks)
        return torch.cat(losses)

    def observe(self, nll_BT: Tensor) -> None:
        """Add the gradient of a loss to the sums of all levels; they must not be due before `advance`."""
        nll_BT.sum().backward()
        self.optimizers.count(nll_BT.numel())

    def advance(self, tokens: int) -> Tuple[str, ...]:
        """Move the clock and write the levels that are due, fastest first; returns the names of those written.

        A gradient sum that is empty or not finite is dropped instead of written.
        """
        before, self.tokens = self.tokens, self.tokens + tokens
        return tuple(name for name in self.clock.due(before, self.tokens) if self._write(name))

    def _write(self, name: str) -> bool:
        if self.ranks > 1:
            self._reduce(name)
        gradients = [p.grad for p in self.optimizers.parameters[name].values() if p.grad is not None]
        sound = bool(gradients) and all(bool(torch.isfinite(g.sum())) for g in gradients)
        if sound and self.optimizers.tokens[name]:
            if self.starts is not None:
                self.starts.collect(name, self.optimizers)
            self.optimizers.write(name)
        else:
            sound = False
            self.optimizers.discard(name)
        if self.starts is not None:
            self.starts.period_ended(name, self.optimizers)
        return sound

    def _reduce(self, name: str) -> None:
        """Sum a level's gradients over the ranks: once per period, not once per step."""
        parameters = list(self.optimizers.parameters[name].values())
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
        dist.all_reduce(flat, group=self.group)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).clone()
        self.optimizers.tokens[name] *= self.ranks

    def state_dict(self) -> Dict[str, Tensor]:
        """Weights, gradient sums, moments, clocks and random state as named tensors; exact to the bit mid-period."""
        state = {f"weight/{n}": p.detach().clone() for n, p in self.model.named_parameters()}
        state.update({k: t.clone() for k, t in self.optimizers.state().items()})
        if self.starts is not None:
            state.update(self.starts.state())
        state["tokens"] = torch.tensor(self.tokens)
        state["rng"] = torch.get_rng_state()
        if torch.cuda.is_available():
            state["rng_cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Take over what `state_dict` returned. ValueError where it is another model's."""
        own = dict(self.model.named_parameters())
        for name, parameter in own.items():
            found = state.get(f"weight/{name}")
            if found is None or found.shape != parameter.shape:
                raise ValueError(
                    f"state: weight/{name} has shape {None if found is None else tuple(found.shape)}, this model needs "
                    f"{tuple(parameter.shape)}; load a state of the same model and levels"
                )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[f"weight/{name}"])
        self.optimizers.load_state(state)
        if self.starts is not None:
            self.starts.load_state(state)
        self.tokens = int(state["tokens"])
        torch.set_rng_state(state["rng"].cpu())
        if "rng_cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["rng_cuda"].cpu())
