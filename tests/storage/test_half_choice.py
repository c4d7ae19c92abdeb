"""Choosing what is worth its bytes."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradckpt_dist.storage.half_choice import (
    MAX_FRONTIER,
    MAX_SHAPES,
    PROFILED_CALLS,
    Cost,
    HalfChoice,
    HalfChoices,
    choose,
)
from gradckpt_dist.storage.operations import Kind, Occurrence, Operation

COSTS = st.lists(st.tuples(st.integers(0, 30), st.floats(0, 1)), max_size=9)


def costs(*pairs: tuple[int, float]) -> dict[Occurrence, Cost]:
    return {("op", number): Cost(seconds=seconds, held_bytes=size) for number, (size, seconds) in enumerate(pairs)}


def worth(chosen: object, of: dict[Occurrence, Cost]) -> tuple[int, float]:
    held = [of[occurrence] for occurrence in chosen]  # type: ignore[attr-defined]
    return sum(cost.held_bytes for cost in held), sum(cost.seconds for cost in held)


@given(COSTS, st.integers(-5, 120))
def test_the_best_that_fits(pairs: list[tuple[int, float]], limit_bytes: int) -> None:
    given_costs = costs(*pairs)
    subsets = (subset for size in range(len(pairs) + 1) for subset in combinations(given_costs, size))
    fitting = [worth(subset, given_costs) for subset in subsets]
    best = max((seconds for size, seconds in fitting if size <= max(limit_bytes, 0)), default=0.0)
    size, seconds = worth(choose(given_costs, limit_bytes), given_costs)
    assert size <= max(limit_bytes, 0)
    assert seconds == pytest.approx(best)


def test_many_unlike_outputs_stay_within_the_limit_and_near_the_best() -> None:
    given_costs = costs(*((1000 + 37 * n * n % 911, 1 + (n * n % 83) / 83) for n in range(120)))
    limit_bytes = 60_000
    size, seconds = worth(choose(given_costs, limit_bytes), given_costs)
    by_density = sorted(given_costs.values(), key=lambda cost: cost.held_bytes / cost.seconds)
    room, bound = float(limit_bytes), 0.0
    for cost in by_density:  # the fractional knapsack, which no whole one beats
        share = min(1.0, room / cost.held_bytes)
        room, bound = room - share * cost.held_bytes, bound + share * cost.seconds
    assert size <= limit_bytes
    assert 0.99 * bound <= seconds <= bound
    assert len(given_costs) < MAX_FRONTIER


def test_the_choice_is_by_the_median_of_the_profiled_calls() -> None:
    choice = HalfChoice()
    samples = [(9.0, 1.0), (1.0, 2.0), (1.0, 2.0)]
    assert len(samples) == PROFILED_CALLS
    chosen = []
    for one, other in samples:
        assert not choice.settled
        assert choice.selection.considers("anything", Operation(kind=Kind.CHEAP))
        chosen.append(choice.learn(costs((8, one), (8, other)), 8))
    assert chosen == [{("op", 0)}, {("op", 0)}, {("op", 1)}]
    assert choice.settled
    assert choice.selection.keeps(("op", 1))
    assert not choice.selection.keeps(("op", 0))
    assert choice.selection.considers("op", Operation(kind=Kind.EXPENSIVE))
    assert not choice.selection.considers("another", Operation(kind=Kind.EXPENSIVE))


def test_inputs_of_any_length_share_the_choices_of_the_first_lengths() -> None:
    choices = HalfChoices()
    first = [choices.find("kind", ((2, 10 * (length + 1)),)) for length in range(MAX_SHAPES)]
    assert len({id(choice) for choice in first}) == len(choices) == MAX_SHAPES
    assert choices.find("kind", ((2, 10),)) is first[0]
    assert choices.find("kind", ((2, 33),)) is first[2]
    assert choices.find("kind", ((2, 1000),)) is first[-1]
    assert choices.find("another", ((2, 33),)) not in first
    assert len(choices) == MAX_SHAPES + 1
