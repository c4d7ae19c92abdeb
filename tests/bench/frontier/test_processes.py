"""Processes that die, hang, refuse or babble: an error or an answer, no wait without end, and nobody left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from demo_arms import Process, await_states, process_tree

from gradckpt_dist.bench.frontier.processes import Processes, RefusedError, WorkerProcess
from gradckpt_dist.errors import GradckptError

ECHO = """
import json, sys
for line in sys.stdin: print(json.dumps({'got': json.loads(line)}), flush=True)
"""
REFUSES = """
import sys
sys.stdin.readline()
print('{"refused": "no such package"}', flush=True)
sys.stdin.read()
"""
FAILS = REFUSES.replace("refused", "failed").replace("no such package", "ValueError: 3")
DIES = """
import sys
sys.stdin.readline()
raise ValueError("out of cheese")
"""
KILLED = """
import os, sys
sys.stdin.readline()
os.kill(os.getpid(), 9)
"""
CUT_OFF = """
import sys
sys.stdin.readline()
print('{"seconds": 1', end='', flush=True)
"""
HANGS = """
import subprocess, time
subprocess.Popen(["sleep", "600"])
time.sleep(600)
"""

Start = Callable[[str], tuple[Processes, WorkerProcess]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Have a script run as the one worker."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def start(code: str) -> tuple[Processes, WorkerProcess]:
        (tmp_path / "scripted.py").write_text("def main():\n" + textwrap.indent(code, "    "))
        processes = Processes(tmp_path, module="scripted")
        return processes, processes.start("the one")

    return start


def _family(root: int, members: int) -> set[Process]:
    """The process with what it has started, once that is so many."""
    while len(family := process_tree(root)) < members:
        time.sleep(0.01)
    return family


def test_requests_are_answered_in_order(start: Start) -> None:
    processes, worker = start(ECHO)
    with processes:
        worker.send({"do": "a"})
        worker.send({"do": "b"})
        assert worker.receive() == {"got": {"do": "a"}}
        assert worker.receive() == {"got": {"do": "b"}}
        assert worker.ask({"long": "x" * 100_000}) == {"got": {"long": "x" * 100_000}}
        family = _family(worker.number, 1)
    await_states(family, "ZX")


def test_a_refusal_is_told_from_a_failure(start: Start) -> None:
    processes, worker = start(REFUSES)
    with processes, pytest.raises(RefusedError, match=r"^no such package$"):
        worker.ask({})
    processes, worker = start(FAILS)
    with processes, pytest.raises(GradckptError, match=r"^the one: ValueError: 3; it wrote nothing on stderr$"):
        worker.ask({})


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (DIES, r"^the one: its process died; it last wrote: ValueError: out of cheese$"),
        (KILLED, r"^the one: its process died; it wrote nothing on stderr$"),
        (CUT_OFF, r"^the one: its process died; it wrote nothing on stderr$"),
    ],
)
def test_death_is_an_error(start: Start, code: str, message: str) -> None:
    processes, worker = start(code)
    with processes:
        with pytest.raises(GradckptError, match=message):
            worker.ask({})
        with pytest.raises(GradckptError, match=message):
            worker.ask({})


def test_a_process_that_hangs_is_ended_with_what_it_started(start: Start) -> None:
    processes, worker = start(HANGS)
    with processes:
        family = _family(worker.number, 2)
        with pytest.raises(GradckptError, match=r"^the one: no answer in 0\.2 s, so its process was ended"):
            worker.ask({}, seconds=0.2)
        await_states(family, "ZX")


def _leave_by_error(processes: Processes) -> None:
    with pytest.raises(ZeroDivisionError), processes:
        raise ZeroDivisionError


def _leave_as_planned(processes: Processes) -> None:
    with processes:
        pass


@pytest.mark.parametrize("leave", [_leave_by_error, _leave_as_planned])
def test_no_process_outlives_the_block(start: Start, leave: Callable[[Processes], None]) -> None:
    processes, worker = start(HANGS)
    family = _family(worker.number, 2)
    leave(processes)
    await_states(family, "ZX")


def test_a_module_that_cannot_be_imported_is_an_error(tmp_path: Path) -> None:
    message = r"cannot be started; it last wrote: ModuleNotFoundError: No module named 'no_such_module'$"
    with Processes(tmp_path, module="no_such_module") as processes, pytest.raises(GradckptError, match=message):
        processes.start("the one")


def test_workers_die_with_a_bench_that_is_killed() -> None:
    bench = subprocess.Popen(
        [sys.executable, "-m", "gradckpt_dist", "bench", "frontier", "--quick"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert bench.stderr is not None
    try:
        assert bench.stderr.readline() == "settling gradckpt on demo\n"
        family = _family(bench.pid, 3)  # the bench, the nursery and a worker
    finally:
        bench.send_signal(signal.SIGKILL)
        bench.wait()
        bench.stderr.close()
    await_states(family, "ZX")
