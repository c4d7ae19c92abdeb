"""The parent's side of the bench's processes: start them, ask them, and never wait for ever."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gradckpt_dist.bench.frontier import nursery
from gradckpt_dist.errors import GradckptError

ANSWER_SECONDS = 600.0
"""Longer than any build or step: compiling the uneven model cold takes about a minute."""

WORKER = "gradckpt_dist.bench.frontier.worker"

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
_SHOWN_CHARACTERS = 300
_END_SECONDS = 30.0


class RefusedError(GradckptError):
    """A system that cannot run here; the message is the reason."""


class Nursery:
    """The process that forks workers; ``environment`` is theirs."""

    def __init__(self, log: Path, *, module: str, environment: Mapping[str, str]) -> None:
        self._log = log
        self._control, theirs = socket.socketpair()
        command = [sys.executable, "-P", str(Path(nursery.__file__)), str(theirs.fileno()), module]
        with theirs, log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env=dict(environment),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def fork(self, *descriptors: int) -> int:
        """The number of a new worker with this standard input, output and errors.

        Raises:
            GradckptError: the module cannot be imported.
        """
        self._control.settimeout(ANSWER_SECONDS)
        try:
            socket.send_fds(self._control, [b"."], descriptors)
            answer = self._control.recv(64)
        except OSError:
            answer = b""
        if not answer:
            raise GradckptError(f"the bench's processes cannot be started; {_last_words(self._log)}")
        return int(answer)

    def close(self) -> None:
        """End it; workers that still live die with it."""
        self._control.close()
        self._process.kill()
        self._process.wait()


class WorkerProcess:
    """One process. It is in a session of its own: a signal to the bench does not reach it, ``close`` ends it.

    Raises (from ``receive`` and ``ask``):
        RefusedError: the system cannot run here.
        GradckptError: the process failed, died, or did not answer in time; if it did not fail, it has been ended.
    """

    def __init__(self, name: str, log: Path, parent: Nursery) -> None:
        self.name = name
        self._log = log
        self._unread = b""
        self._line, theirs = socket.socketpair()
        try:
            with theirs, log.open("wb") as errors:
                self.number = parent.fork(theirs.fileno(), theirs.fileno(), errors.fileno())
        except BaseException:
            self._line.close()
            raise

    def ask(self, request: Mapping[str, Any], *, seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
        """One request, and its answer."""
        self.send(request)
        return self.receive(seconds=seconds)

    def send(self, request: Mapping[str, Any]) -> None:
        """One request; a process that has died is found by ``receive``."""
        with contextlib.suppress(OSError):
            self._line.sendall(json.dumps(request).encode() + b"\n")

    def receive(self, *, seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
        """The answer to the oldest request that has none yet."""
        line = self._read_line(time.monotonic() + seconds)
        if line is None:
            self.close()
            raise GradckptError(
                f"{self.name}: no answer in {seconds:g} s, so its process was ended; {_last_words(self._log)}"
            )
        if not line:
            self.close()
            raise GradckptError(f"{self.name}: its process died; {_last_words(self._log)}")
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise RefusedError(answer["refused"])
        if "failed" in answer:
            raise GradckptError(f"{self.name}: {answer['failed']}; {_last_words(self._log)}")
        return answer

    def close(self) -> None:
        """End it, with all that it started, and wait until it has let go of its memory."""
        if self._is_closed:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.number, signal.SIGKILL)
        deadline = time.monotonic() + _END_SECONDS
        while self._read_line(deadline):
            continue
        self._line.close()

    @property
    def _is_closed(self) -> bool:
        return self._line.fileno() < 0

    def _read_line(self, deadline: float) -> bytes | None:
        """Without its end; empty if there will be none, None if it was not there in time."""
        if self._is_closed:
            return b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._line, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                try:
                    chunk = self._line.recv(1 << 16)
                except ConnectionResetError:
                    chunk = b""
                if not chunk:
                    return b""
                self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line


class Processes:
    """All processes of the bench. However the ``with`` block is left, none of them is left."""

    def __init__(self, folder: Path, *, module: str = WORKER) -> None:
        self._folder = folder
        self._module = module
        self._nurseries: dict[tuple[tuple[str, str], ...], Nursery] = {}
        self._alive: list[WorkerProcess] = []
        self._logs = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in list(self._alive):
            self.close(process)
        for parent in self._nurseries.values():
            parent.close()

    def start(self, name: str, **environment: str) -> WorkerProcess:
        """A process that waits for its first request; ``environment`` is added to this process's own."""
        process = WorkerProcess(name, self._new_log(), self._nursery(environment))
        self._alive.append(process)
        return process

    def close(self, process: WorkerProcess) -> None:
        """End one of them now."""
        process.close()
        self._alive.remove(process)

    def _nursery(self, environment: Mapping[str, str]) -> Nursery:
        key = tuple(sorted(environment.items()))
        if key not in self._nurseries:
            own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
            caches = {"TORCHINDUCTOR_CACHE_DIR": str(self._folder / "inductor")}
            self._nurseries[key] = Nursery(
                self._new_log(), module=self._module, environment=own | _ENVIRONMENT | caches | dict(environment)
            )
        return self._nurseries[key]

    def _new_log(self) -> Path:
        self._logs += 1
        return self._folder / f"{self._logs}.log"


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"it last wrote: {said[:_SHOWN_CHARACTERS]}" if said else "it wrote nothing on stderr"
