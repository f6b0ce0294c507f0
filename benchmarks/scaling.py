"""How learner and pool scale with nodes: a model of step times in which every number is measured on one or two ranks.

A collective over n ranks is a ring: 2 (n - 1) messages of 1/n of the bytes for an all-reduce, half as many for a
reduce-scatter or an all-gather, each taking alpha + beta * bytes. Nodes are alike and have one rank each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import List, Sequence, Tuple


@dataclass(frozen=True)
class Link:
    """What a message between two ranks costs."""

    alpha: float
    """Seconds per message."""
    beta: float
    """Seconds per byte."""

    def pass_around(self, size: float, ranks: int) -> float:
        """Seconds of a reduce-scatter or an all-gather of `size` bytes."""
        return (ranks - 1) * (self.alpha + self.beta * size / ranks)

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds of an all-reduce of `size` bytes."""
        return 2 * self.pass_around(size, ranks)

    def broadcast(self, size: float, ranks: int) -> float:
        """Seconds until `size` bytes are at all ranks: a tree whose branches pass on what they have so far."""
        return math.ceil(math.log2(max(1, ranks))) * self.alpha + self.beta * size * (ranks > 1)


def fit_link(points: Sequence[Tuple[float, float]], ranks: int) -> Link:
    """The link that all-reduces of some sizes tell of: alpha from the smallest, beta from what the largest takes more.

    Args:
        points: (bytes, seconds) of all-reduces over `ranks` ranks, at least two sizes.

    Raises:
        ValueError: fewer than two ranks or sizes.
    """
    if ranks < 2 or len({size for size, _ in points}) < 2:
        raise ValueError(f"a link is fitted to two ranks and two sizes or more, not {ranks} and {points}")
    (small, least), (large, most) = min(points), max(points)
    beta = max(0.0, (most - least) / (large - small) * ranks / (2 * (ranks - 1)))
    return Link(max(0.0, least / (2 * (ranks - 1)) - beta * small / ranks), beta)


@dataclass(frozen=True)
class Calls:
    """Collectives of one step, by how their messages go."""

    rings: float = 2.0
    """Reduce-scatters and all-gathers; an all-reduce is two."""
    trees: float = 0.0
    """Broadcasts."""


@dataclass(frozen=True)
class Costs:
    """What was measured, in seconds of one rank and in bytes."""

    wake: float
    """Seconds per token of a wake step."""
    full: float
    """Seconds per token of a plain training step of all levels."""
    sleep: float
    """Seconds per token of a sleep step on one rank, guides, engine and optimizer included."""
    weights: float
    """Bytes of the gradients of all levels, in float32."""
    fast: float
    """Bytes of the gradients of the learner's levels."""
    release: float
    """Bytes of a release."""
    adoption: float
    """Seconds to check and take over a release that has arrived."""
    link: Link
    parts: float = 2.0
    """Reduce-scatters or all-gathers of all weights that the bytes of a sleep step amount to; 2: an all-reduce."""
    calls: Calls = Calls()
    """What these bytes are sent in."""


@dataclass(frozen=True)
class Cadence:
    """How a run is paced. Token counts are those of the whole learner or the whole pool unless they are per rank."""

    wake_tokens: int
    """Tokens per wake step and rank."""
    fast_period: int
    """Tokens between two writes of the fastest level."""
    slow_period: int
    """Tokens of the stream between two rounds."""
    sleep_tokens: int
    """Tokens per sleep step and rank."""
    ratio: float
    """Tokens trained on asleep per token streamed."""


@dataclass(frozen=True)
class Point:
    """What so many nodes do."""

    nodes: int
    pool: int
    """Nodes of these that sleep."""
    stream: float
    """Tokens per second that the learner takes from the stream."""
    round_seconds: float
    """Seconds of a round."""
    period_seconds: float
    """Seconds in which the learner streams what a round is about."""
    data_parallel: float
    """Tokens of the stream per second of all nodes in one data-parallel training that repeats what sleep would."""

    @property
    def keeps_up(self) -> bool:
        """Whether the pool ends a round before the next one is due."""
        return self.round_seconds <= self.period_seconds

    @property
    def sustained(self) -> float:
        """Tokens of the stream per second that are also slept on."""
        return self.stream * min(1.0, self.period_seconds / self.round_seconds)


def sleep_step(costs: Costs, ranks: int, tokens: float) -> float:
    """Seconds of a sleep step of `tokens` tokens per rank. Broadcasts are small; their bytes count as rings'."""
    link, calls = costs.link, costs.calls
    rings = calls.rings * link.pass_around(costs.parts * costs.weights / calls.rings, ranks)
    return costs.sleep * tokens + rings + calls.trees * link.broadcast(0.0, ranks)


def learner_rate(costs: Costs, cadence: Cadence, ranks: int) -> float:
    """Tokens per second of a learner of so many ranks: gradients of the fast levels meet once per period, and every
    round a release is adopted."""
    step = ranks * cadence.wake_tokens
    meetings = min(1.0, step / cadence.fast_period)
    seconds = costs.wake * cadence.wake_tokens + meetings * costs.link.all_reduce(costs.fast, ranks)
    adopted = costs.link.broadcast(costs.release, ranks + 1) + costs.adoption
    return step / (seconds + adopted * step / max(step, cadence.slow_period))


def round_seconds(costs: Costs, cadence: Cadence, ranks: int) -> float:
    """Seconds of a round of the pool: its steps; what it reads and the gate are the same for every number of ranks."""
    steps = max(1, math.ceil(cadence.ratio * cadence.slow_period / (ranks * cadence.sleep_tokens)))
    return steps * sleep_step(costs, ranks, cadence.sleep_tokens)


def data_parallel_rate(costs: Costs, cadence: Cadence, ranks: int) -> float:
    """Tokens of the stream per second when every rank trains all levels on everything, and gradients meet each step."""
    tokens = cadence.wake_tokens
    seconds = costs.full * tokens + costs.link.all_reduce(costs.weights, ranks)
    return ranks * tokens / (seconds * (1 + cadence.ratio))


def simulate(costs: Costs, cadence: Cadence, nodes: int, pool: int) -> Point:
    """Learner and pool on their shares of the nodes; ValueError unless each has one."""
    if not 0 < pool < nodes:
        raise ValueError(f"pool={pool} of nodes={nodes} leaves no node to one of learner and pool")
    stream = learner_rate(costs, cadence, nodes - pool)
    period = max(cadence.slow_period, (nodes - pool) * cadence.wake_tokens)
    paced = round_seconds(costs, cadence, pool) * period / cadence.slow_period
    return Point(nodes, pool, stream, paced, period / stream, data_parallel_rate(costs, cadence, nodes))


def balanced(costs: Costs, cadence: Cadence, nodes: int) -> Point:
    """The split that sustains most."""
    return max((simulate(costs, cadence, nodes, pool) for pool in range(1, nodes)), key=lambda point: point.sustained)


def grown(cadence: Cadence, nodes: int) -> Cadence:
    """The cadence for more nodes: periods grow with them, as batches do in data-parallel training."""
    return Cadence(
        cadence.wake_tokens,
        cadence.fast_period * nodes,
        cadence.slow_period * nodes,
        cadence.sleep_tokens,
        cadence.ratio,
    )


def curve(costs: Costs, cadence: Cadence, sizes: Sequence[int] = (2, 10, 100, 1000)) -> List[Point]:
    """Balanced points for some numbers of nodes, periods growing with them (per pair of nodes)."""
    return [balanced(costs, grown(cadence, nodes // 2), nodes) for nodes in sizes]
