from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from demo_arms import Arm, ArmFailedError, Process, process_tree, take_turns

WORKER = """
import sys, time
with open(sys.argv[1], "a", buffering=1) as ticks:
    for _ in range(int(sys.argv[2])):
        ticks.write(f"{time.monotonic()}\\n")
        time.sleep(0.01)
"""
# As torchrun's agent: the work is done by a child in a session of its own.
AGENT = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:], start_new_session=True).returncode)"


def arm(directory: Path, name: str, ticks: int) -> Arm:
    worker = [sys.executable, "-c", WORKER, str(directory / f"{name}.ticks"), str(ticks)]
    command = [sys.executable, "-c", AGENT, *worker]
    return Arm(name, command, directory / f"{name}.log", dict(os.environ), directory)


def root(arm: Arm) -> int | None:
    return None if arm._running is None else arm._running.pid


def test_only_one_arm_runs_at_a_time(tmp_path: Path) -> None:
    arms = [arm(tmp_path, name, ticks=60) for name in ("a", "b", "c")]
    states: list[str] = []

    def look_at_others(running: Arm) -> None:
        numbers = [number for other in arms if other is not running and (number := root(other)) is not None]
        states.extend(process.state() for number in numbers for process in process_tree(number))

    take_turns(arms, 0.3, look_at_others)
    assert states
    assert set(states) <= set("TZX")
    ticks = {one.name: (tmp_path / f"{one.name}.ticks").read_text(encoding="utf-8").split() for one in arms}
    assert {name: len(times) for name, times in ticks.items()} == {"a": 60, "b": 60, "c": 60}
    order = [name for _, name in sorted((float(time), name) for name, times in ticks.items() for time in times)]
    turns = sum(len(one.pauses) + 1 for one in arms)
    assert sum(before != after for before, after in pairwise(order)) < turns


def test_process_tree_reaches_other_sessions() -> None:
    command = [sys.executable, "-c", AGENT, sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as agent:
        assert agent.stdout is not None
        agent.stdout.readline()
        family = process_tree(agent.pid)
        for process in family:
            process.send(9)
    assert len(family) == 2
    assert agent.pid in {process.number for process in family}


def test_a_process_that_is_gone_gets_no_signal() -> None:
    Process(os.getpid(), started=0).send(9)  # the same number, but another process


def test_failed_arm_shows_the_end_of_its_log_and_ends_the_others(tmp_path: Path) -> None:
    lasting = arm(tmp_path, "lasting", ticks=100_000)
    command = [sys.executable, "-c", "print('first'); raise SystemExit('no such data')"]
    failing = Arm("failing", command, tmp_path / "failing.log", dict(os.environ), tmp_path)
    family: set[Process] = set()

    def remember(_: Arm) -> None:
        family.update(process_tree(root(lasting) or 0))

    with pytest.raises(ArmFailedError, match=r"(?s)first.*no such data.*failing ended with exit code 1"):
        take_turns([lasting, failing], 0.5, remember)
    assert len(family) == 2
    assert {process.state() for process in family} <= {"X", "Z"}


def test_interruption_ends_the_running_and_the_stopped(tmp_path: Path) -> None:
    arms = [arm(tmp_path, "a", ticks=100_000), arm(tmp_path, "b", ticks=100_000)]
    family: set[Process] = set()

    def interrupt(running: Arm) -> None:
        family.update(process_tree(root(running) or 0))
        if len(family) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_turns(arms, 0.5, interrupt)
    assert {process.state() for process in family} <= {"X", "Z"}
