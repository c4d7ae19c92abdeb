"""A model of one decision's collectives on many ranks: latency, bandwidth and stragglers. docs/design/scale.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Network:
    """Seconds a message and bytes a second; the tail index of a message's delay, and of a rank's step."""

    latency_seconds: float = 14e-6
    base_seconds: float = 8.4e-6
    bytes_per_second: float = 2.5e9
    message_tail: float = 2.0
    step_tail: float = 2.0
    late_seconds: float = 1e-3
    """The least delay of a rank in a step; its mean is twice that with a tail index of 2."""


@dataclass(frozen=True, kw_only=True)
class Waits:
    """Of each decision, in seconds: what its collectives took, and what of it no step hid."""

    collective_seconds: Array
    exposed_seconds: Array


def simulate(
    algorithm: str,
    ranks: int,
    messages: tuple[tuple[str, int], ...],
    *,
    network: Network,
    step_seconds: float,
    decisions: int,
    generator: np.random.Generator,
) -> Waits:
    """Decisions of ``ranks`` ranks whose training is synchronous, each with one step for each wait.

    ``messages`` are the waits in turn: ``reduce`` (both all-reduces, at once) or ``broadcast``, with their bytes. A
    rank enters a collective as late as it begins its step. The next step begins on all ranks once the last one's
    gradients are there, and then late again, by as much as this rank is.
    """
    collective, exposed = np.zeros(decisions), np.zeros(decisions)
    for decision in range(decisions):
        for kind, size in messages:
            late = _late(network, ranks, generator)
            seconds = _duration(algorithm, kind, size, ranks, network, generator)
            done = late.max() + seconds
            next_boundary = late.max() + step_seconds
            waits = np.maximum(0.0, done - (next_boundary + _late(network, ranks, generator)))
            collective[decision] += seconds
            exposed[decision] += waits.max()
    return Waits(collective_seconds=collective, exposed_seconds=exposed)


def sent_bytes(payload_bytes: int, broadcast_bytes: int, ranks: int) -> int:
    """What one rank sends at most: a ring's or a tree's 2 x payload, and the broadcast to each child of a tree."""
    return math.ceil(2 * (ranks - 1) / ranks * payload_bytes) + math.ceil(math.log2(ranks)) * broadcast_bytes


def _late(network: Network, ranks: int, generator: np.random.Generator) -> Array:
    late: Array = network.late_seconds * (1 + generator.pareto(network.step_tail, ranks))
    return late


def _duration(
    algorithm: str, kind: str, size: int, ranks: int, network: Network, generator: np.random.Generator
) -> float:
    if algorithm == "ring":
        hops = 2 * (ranks - 1) if kind == "reduce" else ranks - 1
        return network.base_seconds + _along_ring(hops, size / ranks if kind == "reduce" else size, network, generator)
    depth = math.ceil(math.log2(ranks))
    levels = [2**level for level in range(depth)]
    down = sum(_slowest(links, size, network, generator) for links in levels)
    up = sum(_slowest(links, size, network, generator) for links in levels) if kind == "reduce" else 0.0
    return network.base_seconds + down + up


def _along_ring(hops: int, size: float, network: Network, generator: np.random.Generator) -> float:
    """One chain of messages; a ring's critical path."""
    delays = network.latency_seconds * (1 + generator.pareto(network.message_tail, hops))
    return float(delays.sum()) + hops * size / network.bytes_per_second


def _slowest(links: int, size: float, network: Network, generator: np.random.Generator) -> float:
    """A level of a tree waits for the slowest of its links: an upper bound."""
    slowest = float(generator.pareto(network.message_tail, links).max())
    return network.latency_seconds * (1 + slowest) + size / network.bytes_per_second
