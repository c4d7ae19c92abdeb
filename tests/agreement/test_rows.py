"""Some rows of a table travel in place of all."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from gradckpt_dist.agreement.rows import SparseRows


@given(st.data(), st.integers(0, 9), st.integers(0, 4), st.integers(0, 12))
def test_rows_come_back_in_their_places(data: st.DataObject, rows: int, start: int, capacity: int) -> None:
    width, after = 3, 2
    sparse = SparseRows(start=start, rows=rows, width=width, capacity=capacity)
    vector = torch.arange(1.0, 1 + start + rows * width + after, dtype=torch.float64)
    chosen = data.draw(st.lists(st.integers(0, rows - 1), unique=True) if rows else st.just([]))
    packed = sparse.pack(vector, chosen)
    assert packed.dtype == torch.float64
    assert len(packed) == start + sparse.capacity * width + after
    kept = set(chosen[len(chosen) - sparse.capacity :] if len(chosen) > sparse.capacity else chosen)
    expected = vector.clone()
    for row in set(range(rows)) - kept:
        expected[start + row * width : start + (row + 1) * width] = 0
    assert sparse.unpack(packed.tolist(), chosen) == expected.tolist()
