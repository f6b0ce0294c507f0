"""Online training: the learner itself trains every level, on what it reads and on replayed text (wake.writes=all).

It is the pool's training step on other batches: the pass that trains on new text is the one that scores it. Replay sees
what lies before a boundary that depends on the stream position alone, so that a resumed learner draws the same.

Shapes: B new sequences, S stored tokens, T = S - 1 predicted ones, N sequences of a step.
"""

from __future__ import annotations

import math
from typing import Callable, Dict, Mapping, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from nl_model.flops import forward_flops, full_step_flops, write_flops
from nl_model.losses import token_nll
from nl_model.model import NestedLM, autocast
from nl_model.weights import split
from pipelines.config.schema import Config
from pipelines.experience.replay import Experience, Replay, usable
from pipelines.sleep.average import WeightAverage
from pipelines.sleep.engine import HeldState, LocalEngine
from pipelines.sleep.schedule import Schedule
from pipelines.sleep.training import Batch, Objective, training_step
from pipelines.wake.hooks import Hook, NoHook

Note = Callable[[Tensor, Tensor], Tensor]
"""Given logits (B, T, V) and loss (B, T) of a batch, says which sequences may be learned from (B,)."""
FEWEST = 16
"""Experiences between two looks at the store, at least; the distance grows with the stream, so that all looks together
cost what is proportional to it."""
STREAM = 1 << 40
"""Added to seeds of draws: rounds have theirs below."""
PREFIX = "trainer/"


def visible_before(key: int) -> int:
    """Keys below this one are replayed when `key` is read: a multiple of a power of two between 1/64 and 1/32 of it."""
    distance = max(FEWEST, 1 << max(0, key // 32).bit_length() >> 1)
    return key // distance * distance


class OnlineTraining:
    """Trains a model on a stream, step by step.

    Args:
        model: float32, on its device; every parameter trains.
        experience: opens the newest version of the store.
        hook: what is added to it; it begins anew with this model.
    """

    def __init__(
        self, model: NestedLM, cfg: Config, experience: Callable[[], Experience], hook: Optional[Hook] = None
    ) -> None:
        self.model, self.cfg, self.experience, self.hook = model, cfg, experience, hook or NoHook()
        sleep = cfg.sleep
        self.owed = self.hook.attach(model, cfg, experience)
        """FLOPs spent since the last step, which the next one reports."""
        self.engine = LocalEngine(model, sleep.optimizer, frozen=self.hook.frozen(), extra=self.hook.parameters())
        self.schedule = Schedule("constant", sleep.optimizer.lr, 0, 0, sleep.warmup)
        weights = {name: p.detach() for name, p in model.named_parameters()}
        self.average = WeightAverage(weights, sleep.average, sleep.average_every) if sleep.average else None
        self.steps, self.trained, self.fresh = 0, 0.0, 0.0
        """Steps so far; sequences due to be trained on, and new ones among them, not yet taken."""
        self.replay: Optional[Tuple[int, Experience, Replay]] = None
        """What is held below a key."""
        shape = (cfg.model, cfg.levels, model.vocab_size)
        self.full, self.forward = float(full_step_flops(*shape)), float(forward_flops(*shape))
        self.full += self.hook.costs(cfg, model.vocab_size).trained
        self.written = float(write_flops(*shape, cfg.sleep.optimizer))
        """FLOPs of one write beside those of its tokens."""

    def step(self, new_BS: Tensor, keys_B: np.ndarray, note: Note, wait: Callable[[], None]) -> float:
        """Read new text and train on the share that is due; returns the FLOPs.

        Args:
            keys_B: stream keys of the new sequences.
            note: to be told of the loss of all new text before any of it is learned from.
            wait: returns when the text is durable; called before the first write.
        """
        B, T = len(new_BS), new_BS.size(1) - 1
        visits, old = self._take(B)
        first = self._held(int(keys_B[0]))
        if first is None:  # nothing to replay yet: new text takes its place
            visits, old = visits + old, 0
        taken = min(visits, B)
        passes = max(1, math.ceil(visits / B)) if visits + old else 0
        # Where not all is trained on, the turn goes round: no place in a batch is favoured.
        order = (torch.arange(B) + self.steps) % B
        new_BS, keys_B, note = new_BS[order], keys_B[order.numpy()], _reordered(note, order)
        news = Batch(new_BS, torch.ones(B, dtype=torch.bool, device=new_BS.device), keys_B)
        reading = _Reading(news, taken, note, self.model, self.cfg.compute.precision, self.hook)
        # The first pass takes all that it can: what it does not train on it has to read for the score alone.
        counts = [min(B, visits - i * B) for i in range(passes)]
        olds = [old * (i + 1) // passes - old * i // passes for i in range(passes)]
        place = 0
        for i, (count, number) in enumerate(zip(counts, olds, strict=True)):
            rows = torch.arange(place, place + count) % B
            place += count
            batch = self._batch(new_BS, keys_B, rows, number, first)
            self._write(batch, reading if not i else _Hooked(self.hook), wait if not i else _nothing)
        if not passes:
            reading.read_only()
            wait()
        trained = T * ((visits + old) * self.full + (B - taken) * self.forward) + passes * self.written
        flops, self.owed = self.owed + trained, 0.0
        return flops

    def boundary(self) -> None:
        """A mark was pinned."""
        self.owed += self.hook.boundary(self.engine)

    def _take(self, B: int) -> Tuple[int, int]:
        """New and replayed sequences to train on now: exact over time for any budget and share."""
        wake = self.cfg.wake
        self.trained += wake.trained * B
        self.fresh += wake.trained * B * (1.0 - wake.replay)
        total, visits = math.floor(self.trained + 1e-9), math.floor(self.fresh + 1e-9)
        visits = min(visits, total)
        self.trained, self.fresh = self.trained - total, self.fresh - visits
        return visits, total - visits

    def _held(self, key: int) -> Optional[Tuple[Experience, Replay]]:
        bound = visible_before(key)
        if not self.cfg.wake.replay:
            return None
        if self.replay is None or self.replay[0] != bound:
            found = self.experience()
            rows = np.flatnonzero(usable(found) & (found.keys < bound))
            self.replay = (bound, found, Replay(found, rows, self.cfg.sleep, self.cfg.run.seed))
        _, found, replay = self.replay
        return (found, replay) if len(replay.held) else None

    def _batch(
        self, new_BS: Tensor, keys_B: np.ndarray, rows: Tensor, old: int, held: Optional[Tuple[Experience, Replay]]
    ) -> Batch:
        tokens, keys, recent = [new_BS[rows]], [keys_B[rows.numpy()]], [np.ones(len(rows), bool)]
        if old and held is not None:
            experience, replay = held
            drawn = replay.draw(old, STREAM + self.cfg.run.seed, self.steps)
            tokens.append(torch.from_numpy(experience.tokens(drawn).astype(np.int64)).to(new_BS.device))
            keys.append(experience.keys[drawn])
            recent.append(np.zeros(old, bool))
        mask = torch.from_numpy(np.concatenate(recent)).to(new_BS.device)
        return Batch(torch.cat(tokens), mask, np.concatenate(keys))

    def _write(self, batch: Batch, objective: Objective, wait: Callable[[], None]) -> None:
        engine = _WhenDurable(self.engine, wait)
        training_step(engine, objective, self.steps, batch, self.schedule.lr(self.steps), self.cfg.compute.precision)
        self.steps += 1
        self.hook.after_step(self.steps)
        if self.average is not None:
            self.average.after_step(self.engine, self.steps)

    def shift(self, shift: Mapping[str, Tensor]) -> None:
        """Follow an adoption that shifted the weights."""
        if self.average is not None:
            for name, delta in shift.items():
                self.average.weights[name] += delta.cpu()

    def state(self) -> Dict[str, Tensor]:
        """Moments, counters, average and the hook's things as named tensors; the weights are the caller's."""
        held = HeldState.of(self.engine, weights=False)
        found = {f"{PREFIX}moment/{name}": tensor for name, tensor in held.tensors.items()}
        found.update({f"{PREFIX}counter/{n}": torch.tensor(v, dtype=torch.float64) for n, v in held.counters.items()})
        if self.average is not None:
            found.update({f"{PREFIX}average/{n}": t for n, t in self.average.weights.items()})
        found.update({f"{PREFIX}hook/{n}": t for n, t in self.hook.state().items()})
        due = [self.steps, self.trained, self.fresh, self.owed]
        found[f"{PREFIX}due"] = torch.tensor(due, dtype=torch.float64)
        return found

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        counters = {name: float(t) for name, t in split(tensors, f"{PREFIX}counter").items()}
        self.engine.load_moments(HeldState(split(tensors, f"{PREFIX}moment"), counters))
        if self.average is not None:
            self.average.weights = {name: t.clone() for name, t in split(tensors, f"{PREFIX}average").items()}
        self.hook.load_state(split(tensors, f"{PREFIX}hook"))
        steps, self.trained, self.fresh, self.owed = tensors[f"{PREFIX}due"].tolist()
        self.steps = int(steps)


def _reordered(note: Note, order: Tensor) -> Note:
    """Tell of sequences in their own order what was computed in another."""
    back = torch.argsort(order)

    def told(logits_BTV: Tensor, nll_BT: Tensor) -> Tensor:
        return note(logits_BTV[back], nll_BT[back])[order]

    return told


def _read(forward: Callable[[Tensor], Tensor], tokens_BS: Tensor) -> Tuple[Tensor, Tensor]:
    """Logits (B, T, V), and the loss of the same tokens (B, T)."""
    logits_BTV = forward(tokens_BS[:, :-1])
    return logits_BTV, token_nll(logits_BTV, tokens_BS[:, 1:])


class _Hooked:
    """The objective of text that was scored before: the loss of its tokens, and what the hook makes of it."""

    def __init__(self, hook: Hook) -> None:
        self.hook = hook

    def loss(self, step: int, forward: Callable[[Tensor], Tensor], batch: Batch) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Mean loss in nats per token."""
        return self._of(*_read(forward, batch.tokens_BS), batch), {}

    def _of(self, logits_BTV: Tensor, nll_BT: Tensor, batch: Batch) -> Tensor:
        loss, penalty = self.hook.loss(nll_BT, logits_BTV, batch).mean(), self.hook.penalty()
        return loss if penalty is None else loss + penalty


class _Reading(_Hooked):
    """The objective of a step's first pass: it scores all new text, those sequences that it does not train on as
    well."""

    def __init__(self, news: Batch, taken: int, note: Note, model: NestedLM, precision: str, hook: Hook) -> None:
        super().__init__(hook)
        self.news, self.taken, self.note, self.model, self.precision = news, taken, note, model, precision

    def loss(self, step: int, forward: Callable[[Tensor], Tensor], batch: Batch) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Mean loss in nats per token of what is finite; new text is told of before."""
        taken, (logits_BTV, nll_BT) = self.taken, _read(forward, batch.tokens_BS)
        finite_B = self._tell((logits_BTV[:taken].detach(), nll_BT[:taken].detach()))
        sound_B = torch.ones(len(batch.tokens_BS), dtype=torch.bool)
        sound_B[:taken] = finite_B[:taken]
        if sound_B.all():
            return self._of(logits_BTV, nll_BT, batch), {}
        # A zero gradient into a row that is not finite comes out of its backward pass as NaN for everyone.
        mask_B = sound_B.to(batch.tokens_BS.device)
        kept = Batch(batch.tokens_BS[mask_B], batch.recent_B[mask_B], batch.keys_B[sound_B.numpy()])
        if not len(kept.tokens_BS):
            nothing: Tensor = 0.0 * sum(p.sum() for p in self.model.parameters() if p.requires_grad)  # type: ignore[assignment]
            return nothing, {}
        return self._of(*_read(forward, kept.tokens_BS), kept), {}

    def read_only(self) -> None:
        """Score all new text without training on any."""
        self._tell()

    def _tell(self, *read: Tuple[Tensor, Tensor]) -> Tensor:
        """Tell of the loss of all new text, of which the first `taken` sequences have logits and loss already."""
        rest_BS = self.news.tokens_BS[self.taken :] if read else self.news.tokens_BS
        if len(rest_BS):
            with torch.no_grad(), autocast(rest_BS.device, self.precision):
                read = (*read, _read(self.model, rest_BS))
        # Logits are large: no copy where none is left.
        logits_BTV, nll_BT = (one[0] if len(one) == 1 else torch.cat(one) for one in zip(*read, strict=True))
        self.hook.scored(self.news, logits_BTV)
        return self.note(logits_BTV, nll_BT)


class _WhenDurable:
    """An engine that writes nothing before the text that it learned from is durable."""

    def __init__(self, engine: LocalEngine, wait: Callable[[], None]) -> None:
        self.engine, self.wait, self.passes = engine, wait, engine.passes

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        return self.engine(tokens_BT)

    def backward(self, loss: Tensor) -> None:
        """As the engine."""
        self.engine.backward(loss)

    def step(self, lr: float) -> None:
        """Wait, then write."""
        self.wait()
        self.engine.step(lr)


def _nothing() -> None:
    """Nothing to wait for."""
