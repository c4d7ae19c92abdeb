"""Host memory that offloaded tensors go to, and the way there and back."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from gradckpt_dist.memory import host_bytes, local_ranks

_CLASSES_PER_DOUBLING = 8
_SHARE_OF_MEMORY = 0.5


class HostPool:
    """Host buffers (uint8, pinned for a device other than the CPU), used again rather than allocated in each step.

    Sizes are rounded up to one of eight a doubling, so that steps of varying shapes share buffers. Only ``take``
    allocates, and never past ``limit_bytes`` in all, what lies idle included.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.allocated_bytes = 0
        """Bytes of all buffers, in use or idle."""
        self.allocations = 0
        """Buffers allocated so far."""
        self._idle: dict[tuple[int, torch.device], list[torch.Tensor]] = {}

    @property
    def idle_bytes(self) -> int:
        """Bytes that wait for their next use."""
        return sum(size_bytes * len(buffers) for (size_bytes, _), buffers in self._idle.items())

    def take(self, size_bytes: int, device: torch.device) -> torch.Tensor | None:
        """A buffer of at least this size for copies from and to ``device``; None if the limit forbids it.

        A buffer stays with its device, whose one stream then orders the old use before the new one.
        """
        key = (_rounded(size_bytes), device)
        idle = self._idle.get(key)
        if idle:
            return idle.pop()
        if not self._make_room(key[0]):
            return None
        self.allocated_bytes += key[0]
        self.allocations += 1
        return torch.empty(key[0], dtype=torch.uint8, device="cpu", pin_memory=device.type != "cpu")

    def give(self, buffer: torch.Tensor, device: torch.device) -> None:
        """Take a buffer back."""
        self._idle.setdefault((buffer.numel(), device), []).append(buffer)

    def _make_room(self, size_bytes: int) -> bool:
        if size_bytes > self.limit_bytes - (self.allocated_bytes - self.idle_bytes):
            return False
        for (idle_size_bytes, _), buffers in self._idle.items():
            while buffers and self.allocated_bytes + size_bytes > self.limit_bytes:
                buffers.pop()
                self.allocated_bytes -= idle_size_bytes
        return True


class Carrier(Protocol):
    """Copies between one device and host buffers; ``flat`` is a whole storage as uint8."""

    def store(self, flat: torch.Tensor, buffer: torch.Tensor) -> None:
        """Begin to copy into the buffer; the caller may drop ``flat`` at once."""

    def fetch(self, buffer: torch.Tensor, size_bytes: int) -> tuple[torch.Tensor, Any]:
        """Begin to copy back; returns new memory on the device and what ``arrive`` has to wait for."""

    def arrive(self, flat: torch.Tensor, ready: Any) -> None:
        """Make the work that is launched from now on wait for a fetched copy."""


class CopyCarrier:
    """For the CPU: the same steps with a plain copy."""

    def store(self, flat: torch.Tensor, buffer: torch.Tensor) -> None:
        buffer[: flat.numel()].copy_(flat)

    def fetch(self, buffer: torch.Tensor, size_bytes: int) -> tuple[torch.Tensor, Any]:
        return buffer[:size_bytes].clone(), None

    def arrive(self, flat: torch.Tensor, ready: Any) -> None:
        pass


class StreamCarrier:
    """For a device with streams: all copies on one stream beside the computation.

    One stream, so that a buffer is written before it is read, and read before it is written again. Device memory is
    allocated on the computation's stream, whose pool it came from and goes back to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._api: Any = torch.get_device_module(device)
        self._stream = self._api.Stream(device=device)

    def store(self, flat: torch.Tensor, buffer: torch.Tensor) -> None:
        self._stream.wait_stream(self._api.current_stream(self._device))
        with self._api.stream(self._stream):
            buffer[: flat.numel()].copy_(flat, non_blocking=True)
        flat.record_stream(self._stream)

    def fetch(self, buffer: torch.Tensor, size_bytes: int) -> tuple[torch.Tensor, Any]:
        flat = torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
        self._stream.wait_stream(self._api.current_stream(self._device))
        with self._api.stream(self._stream):
            flat.copy_(buffer[:size_bytes], non_blocking=True)
            ready = self._stream.record_event()
        flat.record_stream(self._stream)
        return flat, ready

    def arrive(self, flat: torch.Tensor, ready: Any) -> None:
        stream = self._api.current_stream(self._device)
        stream.wait_event(ready)
        flat.record_stream(stream)


def carrier_for(device: torch.device) -> Carrier:
    """How tensors of this device are copied."""
    return CopyCarrier() if device.type == "cpu" else StreamCarrier(device)


def default_limit_bytes() -> int:
    """Half of this machine's (or container's) memory, divided by the processes that torchrun started on it."""
    return int(_SHARE_OF_MEMORY * host_bytes()) // local_ranks()


def _rounded(size_bytes: int) -> int:
    step = max(1, (1 << (size_bytes - 1).bit_length()) // (2 * _CLASSES_PER_DOUBLING))
    return -(-size_bytes // step) * step
