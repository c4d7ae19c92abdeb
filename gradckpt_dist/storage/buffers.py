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

    Which buffers a forward changes is seen in the first one, which copies them all; from then on only those are copied.
    Both version counters and values are compared: BatchNorm's kernels write without counting, and a counted write may
    leave the value as it was. Switching between training and evaluation inside the block starts this again.
    """

    def __init__(self, block: nn.Module) -> None:
        self._all: tuple[BufferKey, ...] = tuple(
            (module, name)
            for module in block.modules()
            for name in module._buffers
            if module._buffers[name] is not None
        )
        self._watched = self._all
        self._settled_modes: tuple[bool, ...] | None = None if self._all else ()

    def snapshot(self) -> Snapshot:
        """Copies of the buffers as they are before the first forward; empty for a block that changes none."""
        if self._settled_modes is not None and self._settled_modes != self._modes():
            self._watched, self._settled_modes = self._all, None
        return {(module, name): _buffer(module, name).detach().clone() for module, name in self._watched}

    def versions(self) -> tuple[int, ...]:
        """Version counters to hand to ``settle`` after the forward; empty once settled."""
        return () if self._settled_modes is not None else tuple(_buffer(*key)._version for key in self._watched)

    def settle(self, before: tuple[int, ...], snapshot: Snapshot) -> None:
        """Watch from now on only the buffers that have changed, and drop the copies of the others."""
        if self._settled_modes is not None:
            return
        changed = tuple(
            key
            for key, version in zip(self._watched, before, strict=True)
            if _buffer(*key)._version != version or not torch.equal(_buffer(*key), snapshot[key])
        )
        for key in self._watched:
            if key not in changed:
                del snapshot[key]
        self._watched, self._settled_modes = changed, self._modes()

    def _modes(self) -> tuple[bool, ...]:
        return tuple(module.training for module, _ in self._all)

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
