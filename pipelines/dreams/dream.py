"""Dreams: synthetic sequences that the awake model makes, at the start of a round, from recent experience.

generate -> judge (finite, varied, as likely as real text, no copy) -> score -> choose -> optionally reward: all of it
a function of (snapshot, plan, weights). A dream's parents are real streamed experiences of the round: never another
dream, never anything quarantined, never probe text, which the store does not hold.
Shapes: B sequences, S stored tokens (context + 1), P prompt tokens, T = S - 1.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Dict, Iterator, List, Optional, Protocol, Tuple

import numpy as np
import torch
from torch import Tensor

from nl_model.generate import SamplingConfig, complete
from nl_model.model import NestedLM, autocast
from pipelines.config.dreams import DreamConfig
from pipelines.data.stream import SUBJECT_SEPARATOR
from pipelines.dreams.filters import Bands, copied_shares, judge
from pipelines.dreams.score import Tail, gradient_norms, learning_progress, rewards, trained_copy
from pipelines.experience import DREAM_SOURCE, KINDS, Record, dream_key
from pipelines.experience.replay import Experience
from pipelines.sleep.plan import RoundPlan

_STREAM = 0xD3EA
"""Sets the random numbers of dreams apart from those of batches, which come from the same seed."""


@dataclass(frozen=True, eq=False)
class Dream:
    """One dream, and how it came about."""

    tokens: np.ndarray
    """(S,) int64."""
    parents: Tuple[int, ...]
    """Keys of the experiences that its prompt comes from, in the order of the text."""
    prompt: int
    """Tokens at its front that are the parents'."""
    way: str
    """sampled, or the level that fired, as blocks.N.NAME."""
    surprise: float = math.nan
    """Mean loss of the awake model on what follows the prompt, nats per token."""
    score: float = math.nan
    """Gradient norm or learning progress (dreams.score)."""
    reward: Optional[float] = None
    """Loss that training on it took off held-out experience, nats per token; None: not measured."""


@dataclass
class Night:
    """The dreams of a round, and what became of the rest."""

    dreams: List[Dream] = field(default_factory=list)
    generated: int = 0
    rejected: Dict[str, int] = field(default_factory=dict)
    """Number of candidates by the reason that sorted them out."""
    passes: float = 0.0
    """Work done, in forward passes over one token."""
    seconds: float = 0.0

    def tokens(self, context: int) -> np.ndarray:
        """Tokens of all dreams, int64 (dreams, context + 1)."""
        rows = [dream.tokens for dream in self.dreams]
        return np.stack(rows) if rows else np.empty((0, context + 1), np.int64)


class Firing(Protocol):
    """Makes one random part of a model fire for some of the sequences that it is about to dream."""

    def __call__(
        self, model: NestedLM, fired_B: np.ndarray, rng: np.random.Generator, gain: float
    ) -> AbstractContextManager[List[str]]:
        """While the context lasts, rows of the bool mask (B,) fire; gives the name of what fires per row ("": none)."""


@contextmanager
def fire_level(model: NestedLM, fired_B: np.ndarray, rng: np.random.Generator, gain: float) -> Iterator[List[str]]:
    """`Firing` of one random level of one random block per sequence: its output counts `gain` times."""
    parts = [(f"blocks.{i}.{n}", mlp) for i, block in enumerate(model.blocks) for n, mlp in block.levels.items()]  # type: ignore[union-attr,operator]
    chosen_B = np.where(fired_B, rng.integers(len(parts), size=len(fired_B)), -1)
    handles = []
    for number in sorted({int(c) for c in chosen_B} - {-1}):
        factor_B11 = torch.ones(len(fired_B), 1, 1, device=model.embedding.weight.device)
        factor_B11[torch.from_numpy(chosen_B == number)] = gain
        hook = lambda _module, _inputs, out, factor=factor_B11: out * factor.to(out.dtype)  # noqa: E731
        handles.append(parts[number][1].register_forward_hook(hook))
    try:
        yield [parts[c][0] if c >= 0 else "" for c in chosen_B]
    finally:
        for handle in handles:
            handle.remove()


def room_for_dreams(cfg: DreamConfig, plan: RoundPlan) -> int:
    """How many dreams a round may keep: its own bound, and what the cap on the store leaves."""
    return max(0, min(cfg.keep, math.floor(cfg.cap * (plan.last_key + 1)) - plan.dreams_stored))


def split_recent(snapshot: Experience, plan: RoundPlan, cfg: DreamConfig) -> Tuple[np.ndarray, np.ndarray]:
    """Rows that may be prompts, and rows held out to measure by: the round's real experience, disjoint, seeded."""
    rows = snapshot.rows_between(max(0, plan.first_key), plan.last_key)
    rows = rows[snapshot.kinds[rows] == KINDS.index("real")]
    rows = np.random.default_rng([plan.seed, plan.round, _STREAM]).permutation(rows)
    held = min(cfg.measure, len(rows) // 2)
    return rows[held:], rows[:held]


def dream(
    model: NestedLM,
    snapshot: Experience,
    plan: RoundPlan,
    cfg: DreamConfig,
    precision: str = "fp32",
    fire: Firing = fire_level,
) -> Night:
    """All dreams of a round.

    Args:
        model: the awake model; unchanged.
        snapshot: the store at the plan's version or any later one.
        plan: the round.
        fire: what fires for a share `cfg.fire` of the candidates.
    """
    start, night = time.perf_counter(), Night()
    prompts, held = split_recent(snapshot, plan, cfg)
    limit = room_for_dreams(cfg, plan)
    if len(held) < 2 or not limit or not all(bool(p.isfinite().all()) for p in model.parameters()):
        return night
    dreamer, device = model, next(model.parameters()).device
    bands, rejected = real_bands(snapshot, held, cfg), Counter[str]()
    with autocast(device, precision):
        for turn in range(max(1, cfg.reward_rounds)):
            rng = np.random.default_rng([plan.seed, plan.round, _STREAM, turn])
            candidates = generate_dreams(dreamer, snapshot, prompts, cfg, rng, fire)
            chosen, reasons = choose(
                Tail(model, _stacked(candidates, device)), candidates, bands, snapshot, plan, cfg, rng
            )
            rejected.update(reasons)
            if cfg.reward_rounds and chosen:
                chosen, useless = _rewarded(model, chosen, snapshot.tokens(held), cfg)
                rejected["useless"] += useless
                if chosen and turn + 1 < cfg.reward_rounds:
                    dreamer = trained_copy(model, _stacked(chosen, device), cfg)
            night.generated += len(candidates)
            night.dreams += chosen
            night.passes += _passes(model, len(candidates), len(held), cfg)
    night.dreams, surplus = _best(night.dreams, limit)
    rejected["not chosen"] += surplus
    night.rejected = {reason: count for reason, count in sorted(rejected.items()) if count}
    night.seconds = time.perf_counter() - start
    return night


def generate_dreams(
    model: NestedLM,
    snapshot: Experience,
    prompts: np.ndarray,
    cfg: DreamConfig,
    rng: np.random.Generator,
    fire: Firing = fire_level,
) -> List[Dream]:
    """`cfg.candidates` unjudged dreams, from rows `prompts` of the snapshot."""
    length, count = snapshot.context + 1, cfg.candidates
    size = prompt_size(length, cfg)
    order = np.concatenate([rng.permutation(prompts) for _ in range(math.ceil(2 * count / len(prompts)))])
    first, second = order[:count], order[count : 2 * count]
    joined = (rng.random(count) < cfg.combine) & (first != second)
    offsets = rng.integers(0, length - size + 1, count)
    fired = rng.random(count) < cfg.fire
    sampling = SamplingConfig(cfg.temperature, top_p=cfg.top_p, seed=int(rng.integers(1 << 62)))

    prompt_BP = snapshot.tokens(first).astype(np.int64)[:, :size]
    others_BS = snapshot.tokens(second).astype(np.int64)
    half = size // 2
    for row in np.flatnonzero(joined):
        prompt_BP[row, half:] = others_BS[row, offsets[row] : offsets[row] + size - half]
    with torch.inference_mode(), fire(model, fired, rng, cfg.gain) as ways:
        device = next(model.parameters()).device
        dreamt_BS = complete(model, torch.from_numpy(prompt_BP).to(device), length - size, sampling).cpu().numpy()
    keys, dreams = snapshot.keys, []
    for place, way in enumerate(ways):
        parents = [first[place], second[place]] if joined[place] else [first[place]]
        dreams.append(Dream(dreamt_BS[place], tuple(int(keys[p]) for p in parents), size, way or "sampled"))
    return dreams


def prompt_size(length: int, cfg: DreamConfig) -> int:
    """Tokens of a prompt in sequences of `length` tokens."""
    return min(max(2, round(cfg.prompt * length)), length - 1)


def real_bands(snapshot: Experience, held: np.ndarray, cfg: DreamConfig) -> Bands:
    """Where real text of a dream's length lies; its loss is the surprise that the store holds, which costs no pass."""
    texts_BN = snapshot.tokens(held)[:, prompt_size(snapshot.context + 1, cfg) :]
    return Bands.of(texts_BN, snapshot.surprise[held].astype(np.float64), cfg.band)


def sort_out(
    tail: Tail, snapshot: Experience, candidates: List[Dream], bands: Bands, plan: RoundPlan, cfg: DreamConfig
) -> Tuple[List[int], np.ndarray, Counter[str]]:
    """Places of the candidates that pass every filter, losses of all (B,), and how many failed which filter first."""
    prompt = candidates[0].prompt
    with torch.no_grad():
        losses_B = tail.losses(tail.weights, slice(None), prompt).double().cpu().numpy()
    behind = [one.tokens[prompt:] for one in candidates]
    copied = copied_shares(snapshot, behind, [one.parents for one in candidates], plan.last_key, cfg)
    verdicts = [
        judge(tokens, float(loss), float(share), bands, cfg)
        for tokens, loss, share in zip(behind, losses_B, copied, strict=True)
    ]
    good = [place for place, reason in enumerate(verdicts) if reason is None]
    return good, losses_B, Counter(reason for reason in verdicts if reason is not None)


def choose(
    tail: Tail,
    candidates: List[Dream],
    bands: Bands,
    snapshot: Experience,
    plan: RoundPlan,
    cfg: DreamConfig,
    rng: np.random.Generator,
) -> Tuple[List[Dream], Counter[str]]:
    """The best candidates by score and some at random, with loss and score; and the number of others by reason."""
    good, losses_B, rejected = sort_out(tail, snapshot, candidates, bands, plan, cfg)
    score = gradient_norms if cfg.score == "gradient" else learning_progress
    scores = score(tail, good, candidates[0].prompt, cfg)
    limit = room_for_dreams(cfg, plan)
    picked = top_and_random(scores, min(cfg.keep_top, limit), cfg.keep_random, limit, rng)
    rejected["not chosen"] += len(good) - len(picked)
    chosen = [replace(candidates[good[i]], surprise=float(losses_B[good[i]]), score=scores[i]) for i in picked]
    return chosen, rejected


def top_and_random(scores: List[float], top: int, random: int, limit: int, rng: np.random.Generator) -> List[int]:
    """Places of the `top` largest scores (ties: the earlier), then of `random` others; at most `limit`."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    rest = rng.permutation(np.array(order[top:], np.int64)).tolist()
    return [*order[:top], *rest[:random]][:limit]


def to_records(night: Night, snapshot: Experience, plan: RoundPlan) -> List[Record]:
    """The dreams of a round as experiences, marked as such, with parents and the subjects of all parents."""
    records = []
    for number, one in enumerate(night.dreams):
        rows = np.concatenate([snapshot.rows_between(key, key) for key in one.parents])
        named = [r.subject for r in snapshot.records(rows) if r.subject]
        subjects = list(dict.fromkeys(s for names in named for s in names.split(SUBJECT_SEPARATOR)))
        records.append(
            Record(
                key=dream_key(plan.round, number),
                source=DREAM_SOURCE,
                subject=SUBJECT_SEPARATOR.join(subjects) or None,
                kind="dream",
                surprise=one.surprise,
                release=plan.anchor,
                parents=one.parents,
                tokens=one.tokens,
            )
        )
    return records


def _best(dreams: List[Dream], limit: int) -> Tuple[List[Dream], int]:
    """The `limit` dreams of the largest reward, where there are more (several turns of the reward loop)."""
    if len(dreams) <= limit:
        return dreams, 0
    return sorted(dreams, key=lambda d: -(d.reward or 0.0))[:limit], len(dreams) - limit


def _stacked(dreams: List[Dream], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack([dream.tokens for dream in dreams])).to(device)


def _rewarded(model: NestedLM, chosen: List[Dream], held_MS: np.ndarray, cfg: DreamConfig) -> Tuple[List[Dream], int]:
    """The dreams that help on held-out experience, with their reward, and the number of the others."""
    device = next(model.parameters()).device
    measure_MS = torch.from_numpy(held_MS.astype(np.int64)).to(device)
    gains = rewards(model, _stacked(chosen, device), measure_MS, cfg)
    useful = [replace(one, reward=gain) for one, gain in zip(chosen, gains, strict=True) if gain > 0]
    return useful, len(chosen) - len(useful)


def _passes(model: NestedLM, candidates: int, held: int, cfg: DreamConfig) -> float:
    """Forward passes over one token that a turn costs at most; a backward pass counts two, the last block its share."""
    last = 1.0 / len(model.blocks)
    passes = candidates * (2.0 + 3 * last)
    if cfg.reward_rounds:
        passes += held + cfg.keep * (1 + last * (3 * cfg.reward_steps + held))
    return passes * model.cfg.context
