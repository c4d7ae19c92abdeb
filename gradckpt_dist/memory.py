"""How much memory this process uses, and how much it may."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_MEMORY = Path("/proc/meminfo")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")


class MemoryMeter(Protocol):
    """Bytes of one rank."""

    def begin(self) -> None:
        """Forget, where that can be done, what was in use until now."""

    def peak_bytes(self) -> int:
        """The most that was in use since ``begin``, or ever; 0 where this cannot be told."""

    def available_bytes(self) -> int:
        """What this rank may use in all, what it uses now included."""


class HostMeter:
    """Resident memory of the process. What the host has left is shared by the ranks on it."""

    def begin(self) -> None:
        try:
            _CLEAR.write_text("5", encoding="ascii")  # resets VmHWM and nothing else: proc(5)
        except OSError:
            return

    def peak_bytes(self) -> int:
        return _kibibytes(_STATUS, "VmHWM") << 10

    def available_bytes(self) -> int:
        free = (_kibibytes(_MEMORY, "MemAvailable") << 10) or host_bytes()
        limit = _number(_CGROUP_LIMIT)
        if limit:
            free = min(free, max(0, limit - _number(_CGROUP_USED)))
        return free // local_ranks() + (_kibibytes(_STATUS, "VmRSS") << 10)


class DeviceMeter:
    """What PyTorch's allocator on an accelerator has handed out. Its peak statistics are reset where a part begins."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._api = torch.get_device_module(device)

    def begin(self) -> None:
        self._api.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int:
        return int(self._api.max_memory_allocated(self._device))

    def available_bytes(self) -> int:
        free, _ = self._api.mem_get_info(self._device)
        return int(free) + int(self._api.memory_reserved(self._device))


def memory_meter(device: torch.device) -> MemoryMeter:
    """The meter of the memory that activations of this device are in."""
    return HostMeter() if device.type == "cpu" else DeviceMeter(device)


def host_bytes() -> int:
    """This machine's memory, or its container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, _number(_CGROUP_LIMIT) or total)


def local_ranks() -> int:
    """Processes that torchrun started on this host; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _kibibytes(path: Path, field: str) -> int:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


def _number(path: Path) -> int:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return 0
    return 0 if text == "max" else int(text)
