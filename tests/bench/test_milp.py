"""The reference: the optimum of small ones, and nothing on standard output."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from cost_tables import alike, every_choice, tables
from hypothesis import assume, given, settings

from gradckpt_dist.bench.milp import solve_milp
from gradckpt_dist.cost import CostTable

_NOISE = """
import ctypes
from gradckpt_dist.bench import milp
with milp._standard_output_to_error():
    ctypes.CDLL(None).printf(b"noise")
print("figures")
"""


@settings(max_examples=25, deadline=None)
@given(tables(most_blocks=4, most_storages=3))
def test_optimum_of_every_choice(costs: CostTable) -> None:
    choices = [choice for choice in every_choice(costs) if costs.squared_error_of(choice) <= 0.401]
    assume(choices)
    peaks = sorted(costs.peak_bytes_of(choice) for choice in choices)
    peak_bytes = peaks[len(peaks) // 2]
    assume(peak_bytes > costs.fixed_bytes)
    best = min(costs.seconds_of(choice) for choice in choices if costs.peak_bytes_of(choice) <= peak_bytes)
    found = solve_milp(costs, peak_bytes=peak_bytes, squared_error=0.401, time_limit_s=10)
    assert found.optimal
    assert found.seconds == pytest.approx(best, abs=1e-5)
    assert found.bound <= best + 1e-5


def test_only_exact_storages_without_a_tolerance() -> None:
    costs = alike(4)
    exact = solve_milp(costs, peak_bytes=1300, squared_error=0.0, time_limit_s=10)
    lossy = solve_milp(costs, peak_bytes=1300, squared_error=1.0, time_limit_s=10)
    assert exact.seconds == pytest.approx(2.0)
    assert lossy.seconds == pytest.approx(0.5)
    assert np.isfinite(exact.bound)


def test_standard_output_is_left_to_the_figures() -> None:
    done = subprocess.run([sys.executable, "-c", _NOISE], capture_output=True, text=True, check=True)
    assert done.stdout == "figures\n"
    assert done.stderr == "noise"
