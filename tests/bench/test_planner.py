"""``gradckpt bench planner``: the object that tools read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support import run_command

from gradckpt_dist.bench import milp
from gradckpt_dist.bench.planner_instances import create_planner_instance
from gradckpt_dist.errors import GradckptError


def test_quick_run_prints_one_object(tmp_path: Path) -> None:
    output = tmp_path / "planner.json"
    command = [sys.executable, "-m", "gradckpt_dist", "bench", "planner", "--quick", "--json", "--output", str(output)]
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads(output.read_text())
    assert {"name", "versions", "machine", "command", "rows", "worst_gap_to_milp"} <= set(result)
    assert 1 <= result["within"] <= result["solved_by_milp"] <= result["instances"] == 9
    rows = result["rows"]
    assert {row["blocks"] for row in rows} == {10, 100, 1000}
    assert {row["kind"] for row in rows} == {"random", "structured", "unequal"}
    assert all(row["seconds"] > 0 and row["storages"] == 8 for row in rows)
    for row in rows:
        if row["reference"] == "milp":
            assert -1e-5 <= row["gap_to_milp"] <= 1e-3
        else:
            assert 0 <= row["gap_to_milp"] < 0.1
    assert {row["reference"] for row in rows if row["blocks"] == 10} == {"milp"}
    assert {row["reference"] for row in rows if row["blocks"] == 1000} == {"dual_bound"}


def test_missing_scipy_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    monkeypatch.setitem(sys.modules, "scipy", None)
    instance = create_planner_instance("random", 3, np.random.default_rng(0), lossy=False)
    with pytest.raises(GradckptError, match=r"scipy is not installed; pip install 'gradckpt_dist\[bench\]'"):
        milp.solve_milp(instance.costs, peak_bytes=2**40, squared_error=0.0, time_limit_s=1)
