"""Running a block's forward a second time without a second change of its buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

BufferKey = tuple[nn.Module, str]
Snapshot = dict[BufferKey, torch.Tensor]


class BufferGuard:
    """Keeps a recomputation from changing buffers, such as BatchNorm's running statistics.

    Which buffers a forward changes is read off their version counters, so that any module is covered and only those
    buffers are copied. The first forward copies them all, once.
    """

    def __init__(self, block: nn.Module) -> None:
        self._watched: tuple[BufferKey, ...] = tuple(
            (module, name)
            for module in block.modules()
            for name in module._buffers
            if module._buffers[name] is not None
        )
        self._settled = not self._watched

    def snapshot(self) -> Snapshot:
        """Copies of the buffers as they are before the first forward; empty for a block that changes none."""
        return {(module, name): _buffer(module, name).detach().clone() for module, name in self._watched}

    def versions(self) -> tuple[int, ...]:
        """Version counters to hand to ``settle`` after the forward; empty once settled."""
        return () if self._settled else tuple(_buffer(*key)._version for key in self._watched)

    def settle(self, before: tuple[int, ...], snapshot: Snapshot) -> None:
        """Watch from now on only the buffers whose counter has moved, and drop the copies of the others."""
        if self._settled:
            return
        moved = tuple(
            key for key, version in zip(self._watched, before, strict=True) if _buffer(*key)._version != version
        )
        for key in self._watched:
            if key not in moved:
                del snapshot[key]
        self._watched, self._settled = moved, True

    @contextmanager
    def substituted(self, snapshot: Snapshot) -> Iterator[None]:
        """Put fresh copies of the snapshot in the buffers' place while the forward runs again."""
        originals = {key: _buffer(*key) for key in snapshot}
        try:
            for (module, name), value in snapshot.items():
                module._buffers[name] = value.clone()
            yield
        finally:
            for (module, name), original in originals.items():
                module._buffers[name] = original


def _buffer(module: nn.Module, name: str) -> torch.Tensor:
    buffer = module._buffers[name]
    if buffer is None:
        raise RuntimeError(f"buffer {name!r} of {type(module).__name__} was removed after it was found")
    return buffer
