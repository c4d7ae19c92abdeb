"""``offload``: what backward will need waits in host memory."""

from __future__ import annotations

import weakref
from typing import Any, Self

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from gradckpt_dist.storage.base import Forward, Storage
from gradckpt_dist.storage.context import StorageContext
from gradckpt_dist.storage.lane import Fetchable, OffloadLane
from gradckpt_dist.storage.ledger import is_parameter
from gradckpt_dist.storage.parts import Shell, arrived, is_distributed
from gradckpt_dist.storage.saved import (
    Account,
    Kept,
    VersionCheck,
    buffer_storages,
    is_movable,
    is_plain,
    without_memory,
)


class Offload(Storage):
    """Copies each saved storage once to pinned host memory, beside the computation, and back before it is needed.

    When a block's backward begins, the block that comes after it in backward is fetched, so that at most two are back
    at a time. Parameters, buffers, small and expanded tensors, tensor subclasses but DTensor, and what is not on the
    device of the block's inputs stay as they are; so does what the lane's limit does not admit. Of a DTensor, this
    rank's part is moved. A graph that is retained after backward stays on the device until it is freed.
    """

    name = "offload"
    exact = True
    reruns = False
    fetches_ahead = True

    def __init__(self, block: nn.Module, lane: OffloadLane) -> None:
        super().__init__(block)
        self._lane = lane

    @classmethod
    def create(cls, block: nn.Module, context: StorageContext) -> Self:
        return cls(block, context.lane)

    @property
    def host_bytes(self) -> int:
        """Bytes of the host buffers that this block uses now."""
        return self.account.host_bytes

    def run(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        call = _Call(self._lane, self.account, self.block, _device_of(self.block, args, kwargs))
        try:
            with saved_tensors_hooks(call.pack, _unpack):
                return forward(*args, **kwargs)
        finally:
            call.seal()


class HostCopy:
    """One storage in a host buffer, fetched at most once, alive for as long as a node has it saved."""

    __slots__ = ("__weakref__", "_account", "_buffer", "_device", "_flat", "_lane", "_ready", "_size_bytes")

    def __init__(self, flat: torch.Tensor, buffer: torch.Tensor, lane: OffloadLane, account: Account) -> None:
        self._buffer = buffer
        self._lane = lane
        self._account = account
        self._device = flat.device
        self._size_bytes = flat.numel()
        self._flat: torch.Tensor | None = None
        self._ready: Any = None
        account.host_bytes += buffer.numel()
        lane.carrier(self._device).store(flat, buffer)

    def fetch(self) -> torch.Tensor:
        """Begin to bring it back."""
        if self._flat is None:
            self._flat, self._ready = self._lane.carrier(self._device).fetch(self._buffer, self._size_bytes)
            self._account.add(self._size_bytes)
        return self._flat

    def arrive(self) -> torch.UntypedStorage:
        """The storage on the device again."""
        flat = self.fetch()
        self._lane.carrier(self._device).arrive(flat, self._ready)
        return flat.untyped_storage()

    def __del__(self) -> None:
        self._account.host_bytes -= self._buffer.numel()
        self._lane.pool.give(self._buffer, self._device)
        if self._flat is not None:
            self._account.add(-self._size_bytes)


class _Saved:
    """A saved tensor whose storage is on the host, or without a ``copy`` one that has stayed."""

    __slots__ = ("_call", "_check", "_copy", "_dtype", "_kept", "_place", "_shell", "_tensor")

    def __init__(self, tensor: torch.Tensor, call: _Call, copy: HostCopy | None, kept: Kept | None) -> None:
        self._call = call
        self._copy = copy
        self._kept = kept
        self._dtype = tensor.dtype
        part = arrived(tensor)
        self._place = (part.storage_offset(), part.shape, part.stride()) if copy is not None else None
        self._shell = Shell(tensor) if copy is not None and is_distributed(tensor) else None
        self._tensor = tensor if copy is None else without_memory(tensor)
        self._check = VersionCheck(tensor, self._tensor)

    def tensor(self) -> torch.Tensor:
        self._check.verify()
        self._call.begin_backward()
        if self._copy is None or self._place is None:
            return self._tensor
        empty = torch.empty(0, dtype=self._dtype, device=self._tensor.device)
        tensor = empty.set_(self._copy.arrive(), *self._place)
        return tensor if self._shell is None else self._shell.around(tensor)


class _Call:
    """One forward of one block."""

    def __init__(self, lane: OffloadLane, account: Account, block: nn.Module, device: torch.device | None) -> None:
        self._lane = lane
        self._account = account
        self._device = device
        self._buffers = buffer_storages(block)
        # The weak references keep a storage's identity from being used again while it is a key.
        self._seen: dict[tuple[int, int], tuple[StorageWeakRef, HostCopy | Kept]] = {}
        self._copies: list[weakref.ref[HostCopy]] = []
        self._previous: weakref.ref[Fetchable] | None = None
        self._in_backward = False

    def pack(self, tensor: torch.Tensor) -> _Saved:
        if is_parameter(tensor):
            # The object itself: ZeRO-3 swaps the memory behind it.
            return _Saved(tensor, self, None, None)
        # An output that kept its history would keep the node that saves it alive, and itself with it.
        tensor = tensor.detach()
        part = arrived(tensor)
        if not is_plain(part):
            return _Saved(tensor, self, None, None)
        tensor = tensor if is_distributed(tensor) else part
        storage = part.untyped_storage()
        key = (storage._cdata, tensor._version)
        if key not in self._seen:
            self._seen[key] = (StorageWeakRef(storage), self._put(part, storage))  # type: ignore[no-untyped-call]
        place = self._seen[key][1]
        return _Saved(tensor, self, place, None) if isinstance(place, HostCopy) else _Saved(tensor, self, None, place)

    def seal(self) -> None:
        """End of the forward: from here on only the graph holds what was saved."""
        places = [place for _, place in self._seen.values()]
        self._copies = [weakref.ref(place) for place in places if isinstance(place, HostCopy)]
        self._seen.clear()
        if self._copies:
            self._previous = self._lane.join(self)

    def begin_backward(self) -> None:
        """Fetch this call, unless that was done in time, and then the one that backward comes to next."""
        if self._in_backward:
            return
        self._in_backward = True
        self.fetch()
        previous = self._previous() if self._previous is not None else None
        if previous is not None:
            previous.fetch()

    def fetch(self) -> None:
        for reference in self._copies:
            copy = reference()
            if copy is not None:
                copy.fetch()

    def _put(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> HostCopy | Kept:
        if self._may_move(tensor, storage):
            buffer = self._lane.take(storage.nbytes(), tensor.device)
            if buffer is not None:
                flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                return HostCopy(flat, buffer, self._lane, self._account)
        return Kept(storage.nbytes(), self._account)

    def _may_move(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> bool:
        return is_movable(tensor) and tensor.device == self._device and storage._cdata not in self._buffers


def _unpack(saved: _Saved) -> torch.Tensor:
    return saved.tensor()


def _device_of(block: nn.Module, args: Any, kwargs: Any) -> torch.device | None:
    inputs = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
    # Indices, masks and lengths may be elsewhere.
    tensor = next((leaf for leaf in inputs if leaf.is_floating_point()), None)
    if tensor is None:
        tensor = next(block.parameters(), None)
    return None if tensor is None else tensor.device
