"""Runs that take turns on one machine: Linux only, as it reads /proc.

Two trainings side by side disturb each other, and two after each other meet a machine that has changed. So one run at
a time is let go for a few seconds, while all processes of the others are stopped (SIGSTOP).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Process:
    """A process; its start time tells it from a later one with the same number."""

    number: int
    started: int

    def state(self) -> str:
        """One letter, as in proc(5): ``T`` is stopped, ``Z`` dead, ``X`` gone."""
        stat = read_stat(self.number)
        return stat.state if stat is not None and stat.started == self.started else "X"

    def send(self, signal_number: int) -> None:
        """Does nothing if the process is gone."""
        if self.state() == "X":
            return
        try:
            os.kill(self.number, signal_number)
        except ProcessLookupError:
            return


@dataclass(frozen=True)
class Stat:
    """What /proc/PID/stat says of a process."""

    parent: int
    state: str
    started: int


def read_stat(number: int) -> Stat | None:
    """None if there is no such process."""
    try:
        text = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return Stat(parent=int(fields[1]), state=fields[0], started=int(fields[19]))


def process_tree(root: int) -> set[Process]:
    """The process ``root`` and all that come from it, whatever session they are in."""
    numbers = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    stats = {number: stat for number in numbers if (stat := read_stat(number)) is not None}
    family = {root} & stats.keys()
    while more := {number for number, stat in stats.items() if stat.parent in family} - family:
        family |= more
    return {Process(number, stats[number].started) for number in family}


def await_states(processes: Iterable[Process], states: str) -> None:
    """A signal is on its way for a moment: return when it has arrived everywhere."""
    while not all(process.state() in states or _waits_to_stop(process, states) for process in processes):
        time.sleep(0.001)


def _waits_to_stop(process: Process, states: str) -> bool:
    """Between vfork and exec a process sleeps until its child goes on; stopped, that one never does."""
    if "T" not in states or process.state() != "D":
        return False
    return any(child.state() == "T" for child in process_tree(process.number) - {process})


@dataclass
class Arm:
    """A run, and the times (``time.monotonic``) in which it was stopped."""

    name: str
    command: Sequence[str]
    log: Path
    environment: dict[str, str]
    directory: Path
    pauses: list[tuple[float, float]] = field(default_factory=list)
    _running: subprocess.Popen[bytes] | None = None
    _family: set[Process] = field(default_factory=set)
    _paused_at: float = 0.0

    def go(self) -> None:
        """Start, or go on."""
        if self._running is None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("wb") as log:
                self._running = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self.environment,
                    cwd=self.directory,
                    start_new_session=True,  # Ctrl-C reaches the demo only, which ends its runs itself
                )
            return
        for process in self._family:
            process.send(signal.SIGCONT)
        self.pauses.append((self._paused_at, time.monotonic()))

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None if the run still goes on after so many seconds."""
        if self._running is None:
            return None
        try:
            return self._running.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def pause(self) -> None:
        """Stop all processes of this run; they stand when this returns."""
        if self._running is None:
            return
        self._paused_at = time.monotonic()
        self._family = set()
        while new := process_tree(self._running.pid) - self._family:  # until none was born meanwhile
            for process in new:
                process.send(signal.SIGSTOP)
            await_states(new, "TZX")
            self._family |= new

    def end(self) -> None:
        """Kill whatever is left of it, stopped or not."""
        if self._running is None:
            return
        if self._running.poll() is None:
            self.pause()
        for process in self._family:
            process.send(signal.SIGKILL)
        self._running.wait()
        await_states(self._family, "ZX")


class ArmFailedError(Exception):
    """A run ended with an error."""

    def __init__(self, arm: Arm, code: int) -> None:
        tail = "\n".join(own_lines(arm.log)[-30:])
        super().__init__(f"{tail}\n\nThe run {arm.name} ended with exit code {code}; the whole log is {arm.log}")


def own_lines(log: Path) -> list[str]:
    """What a run wrote before torchrun began to report its end, which is long and does not hold the cause."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return list(takewhile(lambda line: "torch/distributed/elastic/multiprocessing/api.py:" not in line, lines)) or lines


def take_turns(arms: Sequence[Arm], slice_seconds: float, show: Callable[[Arm], None]) -> None:
    """Run all arms to their end, one at a time for ``slice_seconds``; ``show`` is called with the one that runs.

    Raises:
        ArmFailedError: one ended with an error. All others are then ended, as on any exception.
    """
    waiting = deque(arms)
    try:
        while waiting:
            arm = waiting.popleft()
            arm.go()
            code = None
            ends = time.monotonic() + slice_seconds
            while code is None and (time.monotonic() < ends or not waiting):
                code = arm.wait(POLL_SECONDS)
                show(arm)
            if code is None:
                arm.pause()
                waiting.append(arm)
            elif code != 0:
                raise ArmFailedError(arm, code)
    finally:
        for arm in arms:
            arm.end()
