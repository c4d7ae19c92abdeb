"""The helpers of the other tests: a rank that fails, dies or hangs is reported, and nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from demo_arms import read_stat
from support import RankError, run_command, run_distributed_test, run_torchrun

HANGS = """
import os, pathlib, sys, time
print("started", flush=True)
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(600)
"""


def _sum_of_ranks(directory: str, factor: int) -> None:
    total = torch.tensor([dist.get_rank() * factor])
    dist.all_reduce(total)
    Path(directory, str(dist.get_rank())).write_text(f"{total.item()} {torch.get_num_threads()} {os.getpid()}")


def _fails(guilty: int) -> None:
    if dist.get_rank() == guilty:
        raise ValueError("the cause")


def _fails_while_others_wait(guilty: int) -> None:
    _fails(guilty)
    dist.barrier()


def _dies(guilty: int) -> None:
    if dist.get_rank() == guilty:
        os.kill(os.getpid(), signal.SIGKILL)


def _exits(guilty: int) -> None:
    if dist.get_rank() == guilty:
        os._exit(7)


def _hangs(guilty: int, directory: str) -> None:
    Path(directory, str(dist.get_rank())).write_text(str(os.getpid()))
    if dist.get_rank() == guilty:
        time.sleep(600)


def _ended(number: int) -> bool:
    stat = read_stat(number)
    return stat is None or stat.state == "Z"


def _await_end(number: int) -> None:
    deadline = time.monotonic() + 30
    while not _ended(number):
        assert time.monotonic() < deadline, f"process {number} still runs"
        time.sleep(0.05)


def test_every_rank_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    run_distributed_test(_sum_of_ranks, 3, str(tmp_path), 10)
    said = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [line[:2] for line in said] == [["30", "1"]] * 3
    assert len({line[2] for line in said} | {str(os.getpid())}) == 4


def test_a_failing_rank_is_named_with_its_traceback() -> None:
    with pytest.raises(RankError) as caught:
        run_distributed_test(_fails, 2, 1)
    message = str(caught.value)
    assert message.startswith("rank 1:\nTraceback")
    assert message.rstrip().endswith("ValueError: the cause")
    assert "in _fails" in message
    assert "rank 0" not in message


def test_the_cause_comes_before_what_it_did_to_the_others() -> None:
    with pytest.raises(RankError, match=r"\Arank 0:\n(?s:.*)ValueError: the cause"):
        run_distributed_test(_fails_while_others_wait, 2, 0)


def test_a_dead_rank_is_named_with_its_exit_code() -> None:
    with pytest.raises(RankError, match=r"rank 1 died with exit code -9\Z"):
        run_distributed_test(_dies, 2, 1)
    with pytest.raises(RankError, match=r"rank 0 died with exit code 7\Z"):
        run_distributed_test(_exits, 2, 0)


def test_a_rank_that_may_die() -> None:
    run_distributed_test(_dies, 2, 1, may_die=[1])
    with pytest.raises(RankError, match="rank 1 died"):
        run_distributed_test(_dies, 2, 1, may_die=[0])


def test_a_rank_that_hangs_is_named_and_killed(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"\Arank 1 was still running at the end; 20 s are allowed\Z"):
        run_distributed_test(_hangs, 2, 1, str(tmp_path), timeout_seconds=20)
    assert _ended(int((tmp_path / "1").read_text()))


def test_command_gives_output_errors_and_exit_code() -> None:
    code = "import os, sys; print(os.environ['WORD']); sys.stderr.write('errors'); sys.exit(5)"
    done = run_command([sys.executable, "-c", code], WORD="output")
    assert (done.returncode, done.stdout, done.stderr) == (5, "output\n", "errors")
    assert "WORD" not in os.environ


def test_command_does_not_wait_for_what_outlives_it(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "print(child.pid)\n"
    )
    number = int(run_command([sys.executable, "-c", code], timeout_seconds=60).stdout)
    try:
        assert not _ended(number)
    finally:
        os.kill(number, signal.SIGKILL)
    _await_end(number)


def test_torchrun_that_hangs_leaves_no_worker(tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        run_torchrun(script, 2, str(tmp_path), timeout_seconds=20)
    assert caught.value.output == "started\n" * 2
    for rank in range(2):
        _await_end(int((tmp_path / str(rank)).read_text()))
