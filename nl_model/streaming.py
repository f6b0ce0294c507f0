"""Per-sequence fast state: every sequence of a batch writes fast levels of its own, token by token, in fixed memory.

Fast weights are the model's (shared, at rest) plus a delta per sequence; only deltas are written.
Shapes: B sequences, N tokens of a call, C tokens of a chunk (the fastest period), D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from nl_model.clock import LevelClock
from nl_model.config import LevelConfig, named_levels
from nl_model.losses import token_nll
from nl_model.model import NestedLM
from nl_model.optim.levelwise import build_optimizer, set_steps, steps_of
from nl_model.pointwise import rms_norm
from nl_model.stream_state import States, flatten_states, unflatten_states


class SequenceLevel:
    """One level's deltas, a weight set per sequence, with gradient sums and optimizer of their own."""

    def __init__(self, weights: Dict[str, Tensor], batch: int, cfg: LevelConfig) -> None:
        self.base = weights
        self.cfg = cfg.optimizer
        self.full = {
            name: torch.nn.Parameter(w.detach().expand(batch, *w.shape).clone()) for name, w in weights.items()
        }
        """Weights at rest plus delta, (B, out, in)."""
        self.optimizer = build_optimizer(list(self.full.values()), self.cfg)
        self.tokens = 0
        """Tokens per sequence in the gradient sum."""

    def write(self) -> None:
        """Apply the gradient sum once, clipped for every sequence by itself."""
        gradients = [p.grad for p in self.full.values() if p.grad is not None]
        if self.cfg.reduction == "mean":
            torch._foreach_div_(gradients, float(self.tokens))
        if self.cfg.clip:
            square_B = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0)
            scale_B = (self.cfg.clip / (square_B.sqrt() + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(scale_B.view(-1, *[1] * (gradient.dim() - 1)))
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Forget the gradient sum."""
        self.optimizer.zero_grad(set_to_none=True)
        self.tokens = 0

    def reset(self, rows: Optional[Sequence[int]] = None) -> None:
        """Deltas back to zero, moments and gradient sums too; of all sequences or of those numbered `rows`."""
        chosen = slice(None) if rows is None else torch.as_tensor(rows, device=next(iter(self.full.values())).device)
        with torch.no_grad():
            for name, parameter in self.full.items():
                parameter[chosen] = self.base[name].detach()
                if parameter.grad is not None:
                    parameter.grad[chosen] = 0
                for value in self.optimizer.state.get(parameter, {}).values():
                    if torch.is_tensor(value) and value.shape == parameter.shape:
                        value[chosen] = 0

    def state(self) -> Dict[str, Tensor]:
        """Deltas (as full weights), gradient sums, moments, counter; flat named tensors."""
        flat = {"tokens": torch.tensor(self.tokens)}
        if (steps := steps_of(self.optimizer)) is not None:
            flat["step"] = steps
        for name, parameter in self.full.items():
            flat[f"weight/{name}"] = parameter.detach().clone()
            if parameter.grad is not None:
                flat[f"grad/{name}"] = parameter.grad.clone()
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                flat[f"moment/{kind}/{name}"] = torch.as_tensor(value).clone()
        return flat

    def load_state(self, flat: Dict[str, Tensor]) -> None:
        """Take over what `state` returned."""
        self.tokens = int(flat["tokens"])
        set_steps(self.optimizer, flat.get("step"))
        moments: Dict[str, Dict[str, Tensor]] = {}
        for key, value in flat.items():
            if key.startswith("moment/"):
                _, kind, name = key.split("/", 2)
                moments.setdefault(name, {})[kind] = value
        for name, parameter in self.full.items():
            parameter.data.copy_(flat[f"weight/{name}"])
            gradient = flat.get(f"grad/{name}")
            parameter.grad = None if gradient is None else gradient.to(parameter.device).clone()
            self.optimizer.state.pop(parameter, None)
            if name in moments:
                self.optimizer.state[parameter] = {k: v.to(parameter.device).clone() for k, v in moments[name].items()}


class StreamingModel:
    """A model that goes on learning while it reads B streams side by side; row b equals a run of that stream alone.

    Feed any number of tokens: positions, memories, gradient sums and clocks go on where they were, so the way a stream
    is cut into calls changes nothing. Memory is fixed where the mixer's is (titans, or attention with a window). A
    level is written when its period is over, with the next-token losses of exactly its tokens at the weights that they
    were read with; the loss at a position is known once the next token is.

    Args:
        model: at rest; never changed.
        batch: number of streams.
        names: levels to write; those of the learner where None.
        learn: whether to write at all; without, this is plain inference with states.
        step_tokens: for levels whose period counts steps: tokens of one step.
    """

    def __init__(
        self,
        model: NestedLM,
        batch: int,
        names: Optional[Sequence[str]] = None,
        learn: bool = True,
        step_tokens: int = 1,
    ) -> None:
        levels = model.level_configs
        learners = [name for name, level in levels.items() if level.owner == "learner"]
        owned = named_levels(levels, learners if names is None else names)
        self.model, self.batch, self.learn = model, batch, learn
        periods = LevelClock.of(levels, step_tokens=step_tokens).periods
        self.clock = LevelClock({name: periods[name] for name in owned})
        self.chunk = min(self.clock.periods.values())
        for name in owned:
            outside = [p for p in model.parameters_of(name) if ".levels." not in p]
            if outside:
                raise ValueError(
                    f"level {name} holds {outside[0]} and more outside of its MLPs; only MLPs can be written per "
                    "sequence: name faster levels"
                )
        self.levels = {
            n: SequenceLevel({k: p.detach() for k, p in model.parameters_of(n).items()}, batch, levels[n])
            for n in owned
        }
        self.first = min(i for n in owned for i in levels[n].block_indices(model.cfg.blocks))
        """Blocks below this one hold no fast level: they are read once and never on the way back."""
        self.position = 0
        self.states: States = model.initial_states(batch)
        """Mixer states after the last token fed."""
        self.chunk_states: States = self.states
        """The same before the first token of the current chunk."""
        self.pending: List[Tensor] = []
        """Token ids and stem outputs of the current chunk, as long as its losses are not learned from."""
        self.pending_x: List[Tensor] = []

    def weights(self) -> Dict[str, Tensor]:
        """The fast weights of every sequence by parameter name, (B, out, in)."""
        return {name: p for level in self.levels.values() for name, p in level.full.items()}

    def feed(self, tokens_BN: Tensor) -> Tensor:
        """Read tokens, int64 (B, N); returns logits (B, N, V) of the token after each.

        The logits of a chunk come from weights that have learned from every chunk before it, and from no later token.
        """
        if tokens_BN.dim() != 2 or tokens_BN.size(0) != self.batch or not tokens_BN.size(1):
            raise ValueError(
                f"tokens have shape {tuple(tokens_BN.shape)}; this stream was made for batch={self.batch} and reads "
                f"({self.batch}, N) with N of at least 1"
            )
        out: List[Tensor] = []
        while tokens_BN.size(1):
            if self.learn and self.pending and self.position % self.chunk == 0:
                self._learn_pending(tokens_BN[:, :1])
            take = self._stretch(tokens_BN.size(1))
            x_BND = self._read_stem(tokens_BN[:, :take])
            for at in range(0, take, self.chunk):
                stop = min(at + self.chunk, take)
                follows_B1 = tokens_BN[:, stop : stop + 1]
                out.append(self._read(tokens_BN[:, at:stop], x_BND[:, at:stop], follows_B1))
            tokens_BN = tokens_BN[:, take:]
        return torch.cat(out, 1)

    def _stretch(self, tokens: int) -> int:
        """How many of the next tokens the stem can read at once: the rest of a chunk, or whole chunks with targets.

        At most a context of them, because attention with a window costs the square of a call.
        """
        room = self.chunk - self.position % self.chunk
        if room < self.chunk or tokens <= self.chunk:
            return min(room, tokens)
        return self.chunk * min((tokens - 1) // self.chunk, max(1, self.model.cfg.context // self.chunk))

    def _read_stem(self, tokens_BN: Tensor) -> Tensor:
        """Embedding and the blocks below the first fast level, which no write changes: (B, N, D)."""
        if self.position % self.chunk == 0:
            self.chunk_states = self.states
        rotary = self.model.rotary(self.position, tokens_BN.size(1))
        with torch.no_grad():
            x_BND = rms_norm(self.model.embedding(tokens_BN))
            x_BND, below = self.model.run_blocks(x_BND, 0, self.first, rotary, self.states)
        self.states = below + self.states[self.first :]
        return x_BND

    def _read(self, tokens_BN: Tensor, x_BND: Tensor, follows_B1: Tensor) -> Tensor:
        """Read part of one chunk from the stem's outputs on: logits (B, N, V).

        Where it is all of one and the next token is known, one pass serves both ends.
        """
        model, first, blocks = self.model, self.first, len(self.model.blocks)
        at_start = self.position % self.chunk == 0
        rotary = model.rotary(self.position, tokens_BN.size(1))
        whole = self.learn and at_start and tokens_BN.size(1) == self.chunk and follows_B1.size(1) == 1
        with torch.set_grad_enabled(whole):
            y_BND, above = model.run_blocks(x_BND, first, blocks, rotary, self.states, self.weights())
            logits_BNV = model.logits(y_BND)
        self.states = self.states[:first] + above
        self.position += tokens_BN.size(1)
        if whole:
            self.states = detach(self.states)
            self._backward(logits_BNV, torch.cat((tokens_BN[:, 1:], follows_B1), 1))
        elif self.learn:
            self.pending.append(tokens_BN)
            self.pending_x.append(x_BND)
        return logits_BNV.detach()

    def _learn_pending(self, next_B1: Tensor) -> None:
        """The chunk's last target has come: read its upper blocks again, with gradient this time."""
        tokens_BC, x_BCD = torch.cat(self.pending, 1), torch.cat(self.pending_x, 1)
        rotary = self.model.rotary(self.position - self.chunk, self.chunk)
        blocks = len(self.model.blocks)
        with torch.enable_grad():
            y_BCD, above = self.model.run_blocks(x_BCD, self.first, blocks, rotary, self.chunk_states, self.weights())
            logits_BCV = self.model.logits(y_BCD)
        # The states of one pass over the chunk, so that it does not matter how its tokens came.
        self.states = self.states[: self.first] + detach(above)
        self.pending, self.pending_x = [], []
        self._backward(logits_BCV, torch.cat((tokens_BC[:, 1:], next_B1), 1))

    def _backward(self, logits_BCV: Tensor, targets_BC: Tensor) -> None:
        """Add a chunk's gradient to all levels, and write those whose period ends with it."""
        parameters = [p for level in self.levels.values() for p in level.full.values()]
        gradients = torch.autograd.grad(token_nll(logits_BCV, targets_BC).sum(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        for level in self.levels.values():
            level.tokens += self.chunk
        end = self.position
        for name in self.clock.due(end - self.chunk, end):
            self.levels[name].write()

    def reset(self, rows: Optional[Sequence[int]] = None) -> None:
        """Forget what was written: deltas back to zero, of all streams or of those numbered `rows`.

        With all rows also the position, the mixers' states, the current chunk, steps counted: the exact initial state.
        Rows by themselves go on reading where they were: what their mixers hold and what waits in the chunk stays.
        """
        for level in self.levels.values():
            level.reset(rows)
        if rows is None:
            for level in self.levels.values():
                level.discard()
                level.optimizer.state.clear()
                set_steps(level.optimizer, None)
            self.position, self.pending, self.pending_x = 0, [], []
            self.states = self.chunk_states = self.model.initial_states(self.batch)

    def state_dict(self) -> Dict[str, Tensor]:
        """Everything as flat named tensors (a snapshot): loading it goes on bit for bit, also inside a chunk."""
        flat = {"position": torch.tensor(self.position)}
        for name, level in self.levels.items():
            flat.update({f"level/{name}/{key}": value for key, value in level.state().items()})
        flat.update(flatten_states("state", self.states))
        flat.update(flatten_states("chunk_state", self.chunk_states))
        if self.pending:
            flat["pending"] = torch.cat(self.pending, 1).clone()
            flat["pending_x"] = torch.cat(self.pending_x, 1).clone()
        return flat

    def load_state_dict(self, flat: Dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned (a rollback). ValueError for another model's, or another batch's."""
        own = self.state_dict()
        for key in [k for k in own if "/weight/" in k or k == "position"]:
            found = flat[key].shape if key in flat else None
            if found != own[key].shape:
                raise ValueError(
                    f"state: {key} has shape {None if found is None else tuple(found)}, this stream (batch="
                    f"{self.batch}) needs {tuple(own[key].shape)}; load a state of the same model, levels and batch"
                )
        self.position = int(flat["position"])
        for name, level in self.levels.items():
            prefix = f"level/{name}/"
            level.load_state({k[len(prefix) :]: v for k, v in flat.items() if k.startswith(prefix)})
        like = self.model.initial_states(self.batch)
        self.states = unflatten_states("state", flat, like)
        self.chunk_states = unflatten_states("chunk_state", flat, like)
        self.pending = [flat["pending"].clone()] if "pending" in flat else []
        self.pending_x = [flat["pending_x"].clone()] if "pending_x" in flat else []


def detach(states: States) -> States:
    """The same states without their graph."""
    return tuple(state.detach() for state in states)


def read_stream(stream: StreamingModel, tokens_BN: Tensor, call: int = 4096) -> Tuple[Tensor, int]:
    """Mean next-token loss of a long stream, read `call` tokens at a time: (loss (B,) in nats, tokens counted)."""
    total_B = torch.zeros(tokens_BN.size(0), dtype=torch.float64, device=tokens_BN.device)
    for start in range(0, tokens_BN.size(1) - 1, call):
        part_BN = tokens_BN[:, start : start + call + 1]
        inputs_BN, targets_BN = part_BN[:, :-1], part_BN[:, 1:]
        total_B += token_nll(stream.feed(inputs_BN), targets_BN).double().sum(1)
    count = tokens_BN.size(1) - 1
    return total_B / count, count
