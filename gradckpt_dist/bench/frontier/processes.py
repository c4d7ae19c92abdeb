"""The parent's side of the bench's processes: start them, ask them, and never wait for ever."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gradckpt_dist.errors import GradckptError

ANSWER_SECONDS = 600.0
"""Longer than any build or step: compiling the uneven model cold takes about a minute."""

COMMAND = (sys.executable, "-m", "gradckpt_dist.bench.frontier.worker")

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
_SHOWN_CHARACTERS = 300
_LAST_BREATH_SECONDS = 5.0


class RefusedError(GradckptError):
    """A system that cannot run here; the message is the reason."""


class WorkerProcess:
    """One process. It is in a session of its own: a signal to the bench does not reach it, ``close`` ends it.

    Raises (from ``receive`` and ``ask``):
        RefusedError: the system cannot run here.
        GradckptError: the process failed, died, or did not answer in time; it has been ended.
    """

    def __init__(self, name: str, log: Path, *, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self._log = log
        self._unread = b""
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(environment),
                bufsize=0,
                start_new_session=True,
            )

    @property
    def number(self) -> int:
        """The process id."""
        return self._process.pid

    def ask(self, request: Mapping[str, Any], *, seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
        """One request, and its answer."""
        self.send(request)
        return self.receive(seconds=seconds)

    def send(self, request: Mapping[str, Any]) -> None:
        """One request; a process that has died is found by ``receive``."""
        if self._process.stdin is None or self._process.stdin.closed:
            return
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def receive(self, *, seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
        """The answer to the oldest request that has none yet."""
        line = self._read_line(time.monotonic() + seconds)
        if line is None:
            self.close()
            raise GradckptError(
                f"{self.name}: no answer in {seconds:g} s, so its process was ended; {self._last_words()}"
            )
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_LAST_BREATH_SECONDS)  # its own exit code, not that of our signal
            self.close()
            raise GradckptError(f"{self.name}: its process died ({self._fate()}); {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise RefusedError(answer["refused"])
        if "failed" in answer:
            raise GradckptError(f"{self.name}: {answer['failed']}; {self._last_words()}")
        return answer

    def close(self) -> None:
        """End it, with all that it started."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _read_line(self, deadline: float) -> bytes | None:
        """Without its end; empty if there will be none, None if it was not there in time."""
        pipe = self._process.stdout
        if pipe is None or pipe.closed:
            return b""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                chunk = pipe.read(1 << 16)
                if not chunk:
                    return b""
                self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _fate(self) -> str:
        code = self._process.returncode
        return f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"it last wrote: {said[:_SHOWN_CHARACTERS]}" if said else "it wrote nothing on stderr"


class Processes:
    """All processes of the bench. However the ``with`` block is left, none of them is left."""

    def __init__(self, folder: Path, *, command: Sequence[str] = COMMAND) -> None:
        self._folder = folder
        self._command = command
        self._alive: list[WorkerProcess] = []
        self._started = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in list(self._alive):
            self.close(process)

    def start(self, name: str, **environment: str) -> WorkerProcess:
        """A process that waits for its first request; ``environment`` is added to this process's own."""
        self._started += 1
        own = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(self._folder / "inductor")}
        process = WorkerProcess(
            name,
            self._folder / f"{self._started}.log",
            command=self._command,
            environment=own | _ENVIRONMENT | caches | environment,
        )
        self._alive.append(process)
        return process

    def close(self, process: WorkerProcess) -> None:
        """End one of them now."""
        process.close()
        self._alive.remove(process)
