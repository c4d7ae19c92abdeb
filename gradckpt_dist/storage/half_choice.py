"""Which outputs are worth half of ``keep``'s bytes, found once for each kind of block."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from statistics import median
from typing import Any

from gradckpt_dist.storage.operations import Kind, Occurrence, Operation

PROFILED_CALLS = 3
MAX_SHAPES = 8
MAX_FRONTIER = 1024


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One output: what making it again takes, and what holding it takes."""

    seconds: float
    held_bytes: int


@dataclass(frozen=True)
class HalfSelection:
    """Holds ``chosen`` outputs; ``operators`` are theirs. Without operators, everything, for the time being."""

    chosen: frozenset[Occurrence] = frozenset()
    operators: frozenset[Any] | None = None

    def considers(self, function: Any, operation: Operation) -> bool:
        if self.operators is None:
            return operation.kind in (Kind.EXPENSIVE, Kind.CHEAP)
        return function in self.operators

    def keeps(self, occurrence: Occurrence) -> bool:
        return self.operators is None or occurrence in self.chosen

    def keeps_gathered(self, args: tuple[Any, ...]) -> bool:
        return False


class HalfChoice:
    """What one kind of block holds.

    Each of the first ``PROFILED_CALLS`` calls times every output once, so that the samples of one operation lie far
    apart; the choice is by the median so far. Every call, the first one too, holds no more than it may.
    """

    def __init__(self) -> None:
        self._seconds: dict[Occurrence, list[float]] = {}
        self._calls = 0
        self.selection = HalfSelection()

    @property
    def settled(self) -> bool:
        """Whether calls need no longer be profiled."""
        return self._calls >= PROFILED_CALLS

    def learn(self, costs: Mapping[Occurrence, Cost], limit_bytes: int) -> frozenset[Occurrence]:
        """Take in one profiled call; returns what it is to hold."""
        self._calls += 1
        for occurrence, cost in costs.items():
            self._seconds.setdefault(occurrence, []).append(cost.seconds)
        chosen = choose(
            {
                occurrence: Cost(seconds=median(self._seconds[occurrence]), held_bytes=cost.held_bytes)
                for occurrence, cost in costs.items()
            },
            limit_bytes,
        )
        if self.settled:
            self.selection = HalfSelection(chosen, frozenset(function for function, _ in chosen))
            self._seconds.clear()
        return chosen


class HalfChoices:
    """The choices of all kinds of block of one engine.

    Each kind has one for each of the first ``MAX_SHAPES`` shapes of its inputs; inputs of other shapes, as of texts of
    any length, get the choice of the nearest size, so that profiling comes to an end.
    """

    def __init__(self) -> None:
        self._choices: dict[Hashable, dict[tuple[Sequence[int], ...], HalfChoice]] = {}

    def find(self, kind: Hashable, shapes: tuple[Sequence[int], ...]) -> HalfChoice:
        """The choice for a block of this kind with inputs of these shapes."""
        by_shapes = self._choices.setdefault(kind, {})
        if shapes not in by_shapes:
            if len(by_shapes) >= MAX_SHAPES:
                return by_shapes[min(by_shapes, key=lambda known: abs(_elements(known) - _elements(shapes)))]
            by_shapes[shapes] = HalfChoice()
        return by_shapes[shapes]

    def __len__(self) -> int:
        return sum(map(len, self._choices.values()))


def choose(costs: Mapping[Occurrence, Cost], limit_bytes: int) -> frozenset[Occurrence]:
    """The outputs that save the most seconds within the limit.

    A 0-1 knapsack, solved over the frontier of (bytes, seconds); exact while that has up to ``MAX_FRONTIER`` points.
    """
    frontier: list[tuple[int, float, tuple[Occurrence, ...]]] = [(0, 0.0, ())]
    for occurrence, cost in costs.items():
        grown = [
            (held_bytes + cost.held_bytes, seconds + cost.seconds, (*chosen, occurrence))
            for held_bytes, seconds, chosen in frontier
            if held_bytes + cost.held_bytes <= max(limit_bytes, 0)
        ]
        best = -1.0
        merged = sorted(frontier + grown, key=lambda point: (point[0], -point[1]))
        frontier = []
        for point in merged:
            if point[1] > best:
                best = point[1]
                frontier.append(point)
        if len(frontier) > MAX_FRONTIER:
            frontier = [*frontier[:-1:2], frontier[-1]]
    return frozenset(frontier[-1][2])


def _elements(shapes: tuple[Sequence[int], ...]) -> int:
    return sum(map(prod, shapes))
