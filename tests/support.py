"""Real process groups for tests."""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GRACE_SECONDS = 10.0


class RankError(Exception):
    """A rank failed, died or hung; the message has its traceback."""


def run_distributed_test(
    func: Callable[..., None],
    world_size: int,
    *args: Any,
    timeout_seconds: float = 120.0,
    may_die: Collection[int] = (),
) -> None:
    """Call ``func(*args)`` on ``world_size`` gloo ranks, each a process with the default group initialised.

    ``func`` is a function of a test module. Ranks in ``may_die`` may be killed by a signal.

    Raises:
        RankError: with the traceback of the first rank that failed, or who died or was still running at the end.
    """
    context = multiprocessing.get_context("spawn")
    file = Path(inspect.getfile(func))
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_run_rank, args=(str(file), func.__name__, rank, world_size, folder, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, Path(folder), timeout_seconds, may_die)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()


def run_torchrun(
    script: str | Path, ranks: int, *args: str, timeout_seconds: float = 180.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """``torchrun --nproc-per-node RANKS SCRIPT ARGS``; ``script`` may be ``-m`` with a module as first argument.

    Raises:
        subprocess.TimeoutExpired: it ran too long; its whole process group has been killed.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    command = [*launch, f"--nproc-per-node={ranks}", str(script), *args]
    return run_command(command, timeout_seconds, OMP_NUM_THREADS="1", **environment)


def run_command(command: list[str], timeout_seconds: float = 180.0, **environment: str) -> Any:
    """Run a command to its end, output captured as text; on a timeout its whole session is killed."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def free_port() -> int:
    """A TCP port of this host that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(ranks: list[Any], folder: Path, timeout_seconds: float, may_die: Collection[int]) -> None:
    deadline = time.monotonic() + timeout_seconds
    while any(process.is_alive() for process in ranks):
        if any(process.exitcode not in (None, 0) for rank, process in enumerate(ranks) if rank not in may_die):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    reports = sorted(folder.glob("failure*"), key=lambda path: path.stat().st_mtime)
    if reports:
        raise RankError("\n".join(path.read_text() for path in reports))
    hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    died = {rank: process.exitcode for rank, process in enumerate(ranks) if process.exitcode and rank not in may_die}
    if died:
        raise RankError(f"ranks died with exit codes {died}")
    if hung:
        raise RankError(f"ranks {hung} were still running after {timeout_seconds:g} s")


def _run_rank(file: str, name: str, rank: int, world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        func = getattr(_load(file), name)
        store = dist.FileStore(f"{folder}/store", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        try:
            func(*args)
        finally:
            dist.destroy_process_group()
    except BaseException:
        Path(folder, f"failure{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        sys.exit(1)


def _load(file: str) -> Any:
    """The test module, whatever its folder: tests are imported by file, not by package."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
