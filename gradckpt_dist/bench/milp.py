"""The planner's reference: the same problem as a mixed-integer programme, solved by HiGHS through scipy."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradckpt_dist.cost import CostTable
from gradckpt_dist.errors import GradckptError

_RELATIVE_GAP = 1e-6
_ENDED_OPTIMAL = 0


@dataclass(frozen=True, kw_only=True)
class MilpResult:
    """``seconds`` of the best plan found (None if none was), ``bound`` on any; ``optimal`` if they are the same.

    HiGHS lets a constraint be exceeded by a millionth, so that its optimum may be lower than any plan within limits.
    """

    seconds: float | None
    bound: float
    optimal: bool


def solve_milp(costs: CostTable, *, peak_bytes: int, squared_error: float, time_limit_s: float) -> MilpResult:
    """Binary x[block, storage], and the bytes held up to each block, which keep the matrix sparse.

    Raises:
        GradckptError: scipy is not installed.
    """
    optimize, sparse = _scipy()
    blocks, storages = costs.extra_seconds.shape
    count = blocks * storages
    allowed = (costs.serves & (costs.squared_error <= squared_error)).ravel()
    binary = np.concatenate([np.ones(count), np.zeros(blocks)])
    with _standard_output_to_error():
        result = optimize.milp(
            np.concatenate([np.where(allowed, costs.extra_seconds.ravel(), 0.0), np.zeros(blocks)]),
            constraints=[
                optimize.LinearConstraint(matrix, low, high)
                for matrix, low, high in _constraints(sparse, costs, peak_bytes - costs.fixed_bytes, squared_error)
            ],
            integrality=binary,
            bounds=optimize.Bounds(0, np.concatenate([allowed.astype(float), np.ones(blocks)])),
            options={"time_limit": time_limit_s, "mip_rel_gap": _RELATIVE_GAP},
        )
    bound = result.mip_dual_bound
    return MilpResult(
        seconds=None if result.x is None else float(result.fun),
        bound=-np.inf if bound is None else float(bound),
        optimal=result.status == _ENDED_OPTIMAL,
    )


def _constraints(sparse: Any, costs: CostTable, capacity: int, squared_error: float) -> list[tuple[Any, float, float]]:
    """(matrix, least, most): one storage a block; held up to a block is a sum; peaks; the error. Bytes by capacity."""
    blocks, storages = costs.extra_seconds.shape
    count = blocks * storages
    rows, columns = np.repeat(np.arange(blocks), storages), np.arange(count)

    def over_choices(values: np.ndarray) -> Any:
        return sparse.csr_matrix((values.ravel(), (rows, columns)), shape=(blocks, count))

    nothing = sparse.csr_matrix((blocks, blocks))
    step = sparse.eye(blocks) - sparse.eye(blocks, k=-1)
    constraints = [
        (sparse.hstack([over_choices(np.ones(count)), nothing]), 1.0, 1.0),
        (sparse.hstack([over_choices(-costs.held_bytes / capacity), step]), 0.0, 0.0),
        (sparse.hstack([over_choices(costs.working_set_bytes / capacity), sparse.eye(blocks)]), -np.inf, 1.0),
    ]
    if squared_error > 0:
        shares = np.minimum(costs.squared_error.ravel() / squared_error, 2.0)
        constraints.append((sparse.csr_matrix(np.concatenate([shares, np.zeros(blocks)])), -np.inf, 1.0))
    return constraints


@contextlib.contextmanager
def _standard_output_to_error() -> Iterator[None]:
    """HiGHS writes to the process's own standard output, which is for the figures."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(saved, 1)
        os.close(saved)


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy import optimize, sparse  # noqa: PLC0415
    except ImportError:
        raise GradckptError(
            "bench planner compares with scipy's HiGHS and scipy is not installed; pip install 'gradckpt_dist[bench]'"
        ) from None
    return optimize, sparse
