"""Evidence: what policies predict from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradckpt_dist import Config, Mask
from gradckpt_dist.policy import Evidence, StaticPolicy, ThresholdPolicy, create_policy

MASK = Mask(blocks=("a", "b", "c"), storages=("recompute",) * 3)
BYTES = {"keep": (100, 200, 300), "recompute": (10, 20, 30)}


def test_bytes_are_the_sum_and_a_storage_not_yet_used_counts_as_keep() -> None:
    evidence = Evidence(current=MASK, impacts=(), stored_bytes=BYTES)
    assert evidence.bytes_of(("keep", "keep", "keep")) == 600
    assert evidence.bytes_of(("recompute", "keep", "recompute")) == 240
    assert evidence.bytes_of(("offload", "recompute", "recompute")) == 150


def test_peak_has_the_working_set_of_one_recomputed_block() -> None:
    evidence = Evidence(current=MASK, impacts=(), stored_bytes=BYTES)
    assert evidence.peak_of(("keep", "keep", "keep")) == 600
    # The last block's backward comes first: 10 + 20 + 30 are stored, and 300 come back.
    assert evidence.peak_of(("recompute", "recompute", "recompute")) == 360
    # In the backward of the first the others are gone, 10 + 100: the most is what is held after forward.
    assert evidence.peak_of(("recompute", "keep", "keep")) == 510
    assert evidence.peak_of(("keep", "recompute", "recompute")) == 450


def test_other_forwards_in_flight_hold_what_later_blocks_hold_for_them() -> None:
    evidence = Evidence(current=MASK, impacts=(), stored_bytes=BYTES, forwards_in_flight=2)
    assert evidence.peak_of(("keep", "keep", "keep")) == 600
    # In the last block's backward 10 + 20 + 30 are held by two forwards, and one brings back 150.
    assert evidence.peak_of(("recompute", "recompute", "recompute")) == 210
    # In that of the second: 20 + 20, of the last 150 of 300, and 100 come back.
    assert evidence.peak_of(("recompute", "recompute", "keep")) == 330


def test_nothing_is_predicted_before_a_measurement() -> None:
    evidence = Evidence(current=MASK, impacts=(1.0, 1.0, 1.0), stored_bytes={})
    assert evidence.bytes_of(MASK.storages) is None
    assert evidence.peak_of(MASK.storages) is None


@given(st.lists(st.tuples(st.integers(0, 10**12), st.integers(0, 10**12), st.booleans()), min_size=1, max_size=30))
def test_peak_is_never_below_what_is_held(rows: list[tuple[int, int, bool]]) -> None:
    storages = tuple("recompute" if high else "keep" for _, _, high in rows)
    evidence = Evidence(
        current=Mask(blocks=tuple(map(str, range(len(rows)))), storages=storages),
        impacts=(),
        stored_bytes={"keep": tuple(row[0] for row in rows), "recompute": tuple(row[1] for row in rows)},
    )
    held, peak = evidence.bytes_of(storages), evidence.peak_of(storages)
    assert held is not None
    assert peak is not None
    assert held <= peak <= held + max(row[0] for row in rows)


@pytest.mark.parametrize(("name", "kind"), [("threshold", ThresholdPolicy), ("static", StaticPolicy)])
def test_policy_by_name(name: str, kind: type) -> None:
    policy = create_policy(Config(policy=name))
    assert type(policy) is kind
    assert policy.name == name
    assert policy.initial(3) == ("recompute",) * 3
