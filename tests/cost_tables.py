"""Cost tables made by hand or drawn, and the optimum by trying everything."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import strategies as st

from gradckpt_dist.cost import CostTable

STORAGES = ("keep", "recompute", "compress8", "compress4")


def table(
    *rows: dict[str, tuple[float, int, int, float]], storages: tuple[str, ...] = STORAGES, fixed_bytes: int = 0
) -> CostTable:
    """A row a block: storage -> (extra seconds, held bytes, working-set bytes, squared error)."""
    absent = (float("inf"), 0, 0, 0.0)
    columns = np.array([[row.get(name, absent) for name in storages] for row in rows])
    return CostTable(
        storages=storages,
        extra_seconds=columns[:, :, 0],
        held_bytes=columns[:, :, 1].astype(np.int64),
        working_set_bytes=columns[:, :, 2].astype(np.int64),
        squared_error=columns[:, :, 3],
        fixed_bytes=fixed_bytes,
    )


def alike(blocks: int) -> CostTable:
    """Identical blocks: ``keep`` holds 100, ``recompute`` 10 and 90 in backward, ``compress8`` 30 with some error."""
    row = {"keep": (0.0, 100, 0, 0.0), "recompute": (1.0, 10, 90, 0.0), "compress8": (0.25, 30, 20, 0.01)}
    return table(*[row] * blocks, storages=("keep", "recompute", "compress8"), fixed_bytes=1000)


@st.composite
def tables(draw: st.DrawFn, most_blocks: int = 5, most_storages: int = 4) -> CostTable:
    """Small numbers, so that ties, zeros and identical blocks are common; some storages do not serve some blocks."""
    blocks, storages = draw(st.integers(1, most_blocks)), draw(st.integers(1, most_storages))

    def array(values: st.SearchStrategy[Any]) -> Any:
        row = st.lists(values, min_size=storages, max_size=storages)
        return np.array(draw(st.lists(row, min_size=blocks, max_size=blocks)))

    seconds = array(st.one_of(st.integers(-1, 6), st.floats(0, 5), st.just(float("inf")))).astype(float)
    seconds[:, 0] = np.where(np.isfinite(seconds[:, 0]), seconds[:, 0], 3.0)
    return CostTable(
        storages=STORAGES[:storages],
        extra_seconds=seconds,
        held_bytes=array(st.integers(0, 8)),
        working_set_bytes=array(st.integers(0, 8)),
        squared_error=array(st.sampled_from([0.0, 0.0, 0.1, 0.25, 0.3, 1e-9])),
        fixed_bytes=draw(st.sampled_from([0, 7])),
    )


def every_choice(costs: CostTable) -> list[np.ndarray]:
    """All choices of storages that serve their blocks."""
    options = [np.flatnonzero(row) for row in costs.serves]
    return [np.array(choice, dtype=np.int64) for choice in itertools.product(*options)]
