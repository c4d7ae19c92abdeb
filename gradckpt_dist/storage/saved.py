"""What storages that replace saved tensors have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from gradckpt_dist.storage.parts import is_distributed, part_of

SMALL_BYTES = 16 * 1024
"""Tensors whose storage is smaller stay as they are."""


class Slack:
    """What the blocks of one engine have let go of since the last forward of one was over.

    A predicted peak has all blocks hold what they hold while the largest working set comes on top. That is so in
    backward of the last block alone: an earlier one may hold as much more for itself as those after it have held.
    """

    def __init__(self) -> None:
        self.held_bytes = 0
        self._most_bytes = 0

    @property
    def bytes(self) -> int:
        """So many may be held beside what backward needs."""
        return self._most_bytes - self.held_bytes

    def end_forward(self) -> None:
        """The forward of a block is over."""
        self._most_bytes = self.held_bytes


class Account:
    """Live bytes of one block: on the device, and in host memory."""

    def __init__(self) -> None:
        self.slack = Slack()
        """Of all the blocks of this block's engine."""
        self.held_bytes = 0
        self.host_bytes = 0
        self._restored: dict[StorageWeakRef, int] = {}
        self._watch: WeakMethod[Callable[[int], None]] | None = None

    def add(self, size_bytes: int) -> None:
        """So much more is held on the device; less if it is negative."""
        self.held_bytes += size_bytes
        self.slack.held_bytes += size_bytes

    def watch(self, note: Callable[[int], None]) -> None:
        """While the object of the method ``note`` lives, tell it what all restored storages that are alive come to."""
        self._watch = WeakMethod(note)

    def restored(self, storage: torch.UntypedStorage) -> None:
        """Backward has got this storage again, on top of what is held."""
        note = None if self._watch is None else self._watch()
        if note is None:
            return
        alive = (item for item in self._restored.items() if not item[0].expired())  # type: ignore[no-untyped-call]
        self._restored = dict(alive)
        self._restored[StorageWeakRef(storage)] = storage.nbytes()  # type: ignore[no-untyped-call]
        note(sum(self._restored.values()))


class Kept:
    """One storage that stays on the device, counted for as long as a node has it saved."""

    __slots__ = ("_account", "_size_bytes")

    def __init__(self, size_bytes: int, account: Account) -> None:
        self._size_bytes = size_bytes
        self._account = account
        account.add(size_bytes)

    def __del__(self) -> None:
        self._account.add(-self._size_bytes)


class VersionCheck:
    """Autograd's own check for in-place changes, which a saved tensor with hooks escapes."""

    __slots__ = ("_dtype", "_expected", "_witness")

    def __init__(self, tensor: Tensor, witness: Tensor) -> None:
        """``witness`` shares the version counter of ``tensor``: itself, or one ``without_memory``."""
        self._dtype = tensor.dtype
        self._expected = tensor._version
        self._witness = witness

    @property
    def changed(self) -> bool:
        """Whether the tensor was changed since."""
        return self._witness._version != self._expected

    def verify(self) -> None:
        """Raise as autograd would.

        Raises:
            RuntimeError: the tensor was changed in place after it had been saved.
        """
        if self.changed:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation after "
                f"its block had saved it: {self._dtype} is at version {self._witness._version}, expected version "
                f"{self._expected}; write to a clone instead"
            )


def is_plain(tensor: Tensor) -> bool:
    """Whether this is an ordinary strided tensor, of no subclass."""
    return type(tensor) is Tensor and tensor.layout is torch.strided


def is_movable(tensor: Tensor) -> bool:
    """Whether storage, offset, shape and stride say all about a plain tensor, and its storage is worth the effort."""
    return (
        tensor.untyped_storage().nbytes() >= SMALL_BYTES
        and not (tensor.is_conj() or tensor.is_neg())
        and not any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    )


def buffer_storages(block: nn.Module) -> set[int]:
    """Identities of the storages of the block's buffers."""
    parts = map(part_of, block.buffers())
    return {part.untyped_storage()._cdata for part in parts if is_plain(part)}


def without_memory(tensor: Tensor) -> Tensor:
    """A tensor that shares this one's version counter and not its storage."""
    probe: Any = tensor.detach()
    nothing = _empty(tensor.dtype, tensor.device)
    if is_distributed(tensor):
        probe._local_tensor = nothing
    else:
        probe.data = nothing
    return probe  # type: ignore[no-any-return]


@cache
def _empty(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)
