"""Real process groups for tests."""

from __future__ import annotations

import gc
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
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from demo_arms import Process, process_tree

GRACE_SECONDS = 10.0
_PRELOADED = [
    "support",
    "gradckpt_dist",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
]
INTERRUPTED = """
import time
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("cleaned up", flush=True)
    raise
"""
"""A script that says when it can be interrupted, and that it was."""


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

    ``func`` is a function of a test module. Ranks in ``may_die`` may end with any exit code, or by a signal.

    Raises:
        RankError: the tracebacks of the ranks that failed, the first one first; which ranks died without one; which
            were still running at the end.
    """
    # Ranks are forked from a process that has imported torch and what comes with it, which takes seconds, once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    file, environment = Path(inspect.getfile(func)), dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=_run_rank, args=(environment, str(file), func.__name__, rank, world_size, folder, args)
            )
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
        subprocess.TimeoutExpired: it ran too long; all its processes have been killed.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    command = [*launch, f"--nproc-per-node={ranks}", str(script), *args]
    return run_command(command, timeout_seconds, OMP_NUM_THREADS="1", **environment)


def run_command(
    command: list[str], timeout_seconds: float = 180.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, output captured as text.

    Raises:
        subprocess.TimeoutExpired: with the output so far. The command and all that came from it have been killed: the
            workers of torchrun too, which are in sessions of their own.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        # Files, not pipes: a process that outlives the command would hold a pipe open, and reading would not end.
        process = subprocess.Popen(
            command, stdout=output, stderr=errors, env=os.environ | environment, start_new_session=True
        )
        try:
            process.wait(timeout_seconds)
        except subprocess.TimeoutExpired as expired:
            raise subprocess.TimeoutExpired(command, timeout_seconds, _text(output), _text(errors)) from expired
        finally:
            if process.returncode is None:
                _kill_tree(process.pid)
                process.wait()
        return subprocess.CompletedProcess(command, process.returncode, _text(output), _text(errors))


@contextmanager
def interruptible(command: list[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A command that SIGINT reaches even where these tests run with it ignored (as a background job does).

    Whatever is left of it and of what came from it at the end is killed.
    """
    handler = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a child inherits only that a signal is ignored
    try:
        process = subprocess.Popen(command, **options)
    finally:
        signal.signal(signal.SIGINT, handler)
    try:
        yield process
    finally:
        if process.poll() is None:
            _kill_tree(process.pid)
        process.communicate()


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _kill_tree(root: int) -> None:
    family: set[Process] = set()
    while more := process_tree(root) - family:
        for process in more:
            process.send(signal.SIGSTOP)
        family |= more
    for process in family:
        process.send(signal.SIGKILL)


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
    wrong = [path.read_text() for path in reports]
    reported = {int(path.name.removeprefix("failure")) for path in reports}
    for rank, process in enumerate(ranks):
        if process.is_alive():
            wrong.append(f"rank {rank} was still running at the end; {timeout_seconds:g} s are allowed")
        elif process.exitcode and rank not in may_die and rank not in reported:
            wrong.append(f"rank {rank} died with exit code {process.exitcode}")
    if wrong:
        raise RankError("\n".join(wrong))


def _run_rank(
    environment: dict[str, str], file: str, name: str, rank: int, world_size: int, folder: str, args: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        func = getattr(_load(file), name)
        store = dist.FileStore(f"{folder}/store", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        try:
            func(*args)
        except BaseException:
            # Before the group goes, which makes the others fail too.
            _report(folder, rank)
            raise
        finally:
            # A wrapped model, in a reference cycle, holds the group. If it is the last to drop it, it holds Python's
            # lock meanwhile, for which a thread of gloo's may be waiting that the group waits for (torch 2.13).
            gc.collect()
            dist.destroy_process_group()
    except BaseException:
        if not Path(folder, f"failure{rank}").exists():
            _report(folder, rank)
        sys.exit(1)


def _report(folder: str, rank: int) -> None:
    Path(folder, f"failure{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")


def _load(file: str) -> Any:
    """The test module, whatever its folder: tests are imported by file, not by package."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
