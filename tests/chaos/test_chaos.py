"""One run of each fault; `make chaos` makes hundreds. faults.py: what goes wrong; driver.py: what may come of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from support import run_command

HERE = Path(__file__).parent
RUNS = 17


def test_each_fault_once_leaves_no_hang_and_no_wrong_gradient() -> None:
    paths = os.pathsep.join([str(HERE.parent.parent), str(HERE)])
    command = [sys.executable, str(HERE / "driver.py"), f"--runs={RUNS}", "--seed=1000"]
    done = run_command(command, OMP_NUM_THREADS="1", PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert (counts["hang"], counts["wrong gradient"], counts["masks differ"], counts["unexpected"]) == (0, 0, 0, 0)
    assert len(counts["faults"]) == counts["runs"] == RUNS
    assert counts["completed"] > 0
    assert counts["stopped with an error"] > 0
    assert counts["decisions"] > 0
