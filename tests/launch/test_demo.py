from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from demo_arms import Process, process_tree
from support import interruptible

REPOSITORY = Path(__file__).parents[2]
SIZES = {"batch": 2, "context": 16, "width": 16, "layers": 3, "heads": 2, "validation-tokens": 600}
TINY = [f"--{name}={size}" for name, size in SIZES.items()]


def demo(directory: Path, *arguments: str) -> list[str]:
    return [sys.executable, "launch/demo.py", "--output", str(directory), *TINY, *arguments]


def test_demo_writes_its_summary_and_says_what_to_try_next(tmp_path: Path) -> None:
    command = demo(tmp_path, "--steps", "80")
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("Try next: ")
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    rows = {row["arm"]: row for row in summary["rows"]}
    assert list(rows) == ["plain", "full", "gradckpt"]
    assert summary["ranks"] == 2
    assert summary["masks_identical"] is True
    assert summary["decisions"] >= summary["distinct_masks"] >= 1
    assert rows["plain"]["step_ratio"] == 1
    assert [rows["plain"]["recomputed_blocks"], rows["full"]["recomputed_blocks"]] == [0, 3]
    assert rows["full"]["held_bytes"] < rows["gradckpt"]["held_bytes"] < rows["plain"]["held_bytes"]
    assert len({row["validation_loss"] for row in summary["rows"]}) == 1


def test_failing_arm_ends_the_demo_with_its_log(tmp_path: Path) -> None:
    command = demo(tmp_path, "--width", "17")
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "--width 17 is no multiple of --heads 2" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "summary.json").exists()


def test_ctrl_c_ends_all_processes(tmp_path: Path) -> None:
    family: set[Process] = set()
    command = demo(tmp_path, "--steps", "100000", "--slice-seconds", "1")
    with interruptible(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL) as running:
        while not (tmp_path / "gradckpt.log").exists():  # by then plain and full are stopped
            assert running.poll() is None
            family |= process_tree(running.pid)
            time.sleep(0.1)
        family |= process_tree(running.pid)
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 130
    assert len(family) > 3
    assert {process.state() for process in family} <= {"X", "Z"}
