"""What the blocks of one engine share when they offload: host memory, the way to it, and the order of their calls."""

from __future__ import annotations

import logging
import weakref
from typing import Protocol

import torch

from gradckpt_dist.storage.hostpool import Carrier, HostPool, carrier_for, default_limit_bytes

logger = logging.getLogger("gradckpt_dist")


class Fetchable(Protocol):
    """One call of a block whose tensors are on the host."""

    def fetch(self) -> None:
        """Begin to bring everything back that backward may still ask for."""


class OffloadLane:
    """``limit_bytes`` bounds the host memory of these blocks together; without it, half the machine's memory.

    The block whose backward comes next is the one that ran forward just before, so each call remembers its
    predecessor, weakly: calls whose graph is gone are gone from the lane.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.pool = HostPool(default_limit_bytes() if limit_bytes is None else limit_bytes)
        self._carriers: dict[torch.device, Carrier] = {}
        self._last: weakref.ref[Fetchable] | None = None
        self._warned = False

    def join(self, call: Fetchable) -> weakref.ref[Fetchable] | None:
        """Enter a call at the end of its forward; returns the one before it."""
        previous, self._last = self._last, weakref.ref(call)
        return previous

    def carrier(self, device: torch.device) -> Carrier:
        """The carrier of this device, made at its first use."""
        if device not in self._carriers:
            self._carriers[device] = carrier_for(device)
        return self._carriers[device]

    def take(self, size_bytes: int, device: torch.device) -> torch.Tensor | None:
        """A host buffer; None, and a warning the first time, where the limit is reached."""
        buffer = self.pool.take(size_bytes, device)
        if buffer is None and not self._warned:
            self._warned = True
            logger.warning(
                "gradckpt: offload has reached its limit of %d MiB of host memory; what does not fit stays on the "
                "device; offload fewer blocks",
                self.pool.limit_bytes >> 20,
            )
        return buffer
