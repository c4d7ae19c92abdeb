"""The cost table: sums and peaks of a choice, and what is no table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cost_tables import alike, table, tables
from hypothesis import given

from gradckpt_dist.cost import CostTable
from gradckpt_dist.errors import GradckptError


def test_peak_is_in_the_backward_of_one_block_with_what_earlier_ones_hold() -> None:
    costs = alike(3)
    assert costs.peak_bytes_of(costs.choice(("keep",) * 3)) == 1300
    # 10 + 10 + 10 are held, and 90 come back in the last block, whose backward is first.
    assert costs.peak_bytes_of(costs.choice(("recompute",) * 3)) == 1120
    # Later blocks' bytes are free again in the backward of the first: 10 + 90, against 210 after forward.
    assert costs.peak_bytes_of(costs.choice(("recompute", "keep", "keep"))) == 1210
    assert costs.peak_bytes_of(costs.choice(("keep", "keep", "recompute"))) == 1300


def test_sums_of_a_choice() -> None:
    costs = alike(3)
    choice = costs.choice(("keep", "recompute", "compress8"))
    assert costs.names(choice) == ("keep", "recompute", "compress8")
    assert costs.seconds_of(choice) == 1.25
    assert costs.held_bytes_of(choice) == 140
    assert costs.squared_error_of(choice) == 0.01


def test_a_storage_that_does_not_serve_costs_for_ever() -> None:
    costs = table({"keep": (0, 1, 0, 0)}, {"keep": (0, 1, 0, 0), "recompute": (1, 1, 0, 0)})
    assert costs.serves.tolist() == [[True, False, False, False], [True, True, False, False]]
    assert costs.seconds_of(costs.choice(("recompute", "keep"))) == float("inf")


@given(tables())
def test_peak_by_its_definition(costs: CostTable) -> None:
    choice = np.zeros(costs.blocks, dtype=np.int64)
    held = costs.held_bytes[:, 0].tolist()
    working = costs.working_set_bytes[:, 0].tolist()
    peaks = [sum(held[: i + 1]) + working[i] for i in range(costs.blocks)]
    assert costs.peak_bytes_of(choice) == costs.fixed_bytes + max(peaks)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"held_bytes": np.zeros((2, 3))}, r"held_bytes is \[2, 3\]; give \[blocks, storages\], here \[3, 3\]"),
        ({"extra_seconds": np.full((3, 3), np.inf)}, "no storage serves block 0"),
        ({"extra_seconds": np.full((3, 3), np.nan)}, "no storage serves block 0"),
        ({"extra_seconds": np.array([[0, np.nan, 0]] * 3)}, "NaN or -inf"),
        ({"squared_error": np.full((3, 3), np.inf)}, "squared_error holds a value that is negative or not finite"),
        ({"held_bytes": np.full((3, 3), -1)}, "held_bytes holds a value that is negative"),
        ({"held_bytes": np.full((3, 3), 2**52)}, r"give 0 to 2\*\*53"),
        ({"fixed_bytes": -1}, r"-1 fixed; give 0 to 2\*\*53"),
    ],
)
def test_what_is_no_table_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(GradckptError, match=message):
        replace(alike(3), **changed)


def test_storages_that_are_not_in_the_table_are_named() -> None:
    with pytest.raises(GradckptError, match="2 storages for 3 blocks"):
        alike(3).choice(("keep", "keep"))
    with pytest.raises(GradckptError, match="offload not in the table; it has keep, recompute, compress8"):
        alike(3).choice(("keep", "keep", "offload"))
