"""Exact count of the bytes that autograd holds for backward, in steps that are measured.

Each tensor storage counts once, however many nodes save it; parameters do not count. Of a DTensor, this rank's part
counts. Nothing here runs in a step that is not measured.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._C import _autograd
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from gradckpt_dist.storage.base import Forward, Storage
from gradckpt_dist.storage.operations import inner_tensors, storage_key
from gradckpt_dist.storage.parts import part_of


def is_parameter(tensor: torch.Tensor) -> bool:
    """Whether this is a parameter or a view of one, sharded and gathered ones (FSDP, ZeRO-3) included."""
    base = tensor._base
    return _is_parameter_itself(tensor) or (base is not None and _is_parameter_itself(base))


def storage_bytes(values: Any) -> dict[int, int]:
    """Bytes of the distinct storages behind these values, by ``storage_key``; parameters left out."""
    return {
        storage_key(tensor): tensor.untyped_storage().nbytes()
        for tensor in inner_tensors(values)
        if not is_parameter(tensor)
    }


def _is_parameter_itself(tensor: torch.Tensor) -> bool:
    # What isinstance says, for plain tensors without its detour through Python.
    if type(tensor) is torch.Tensor:
        return hasattr(tensor, "ds_id") or getattr(tensor, "_is_param", False)
    return isinstance(tensor, nn.Parameter) or hasattr(tensor, "ds_id")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Bytes of one measured step on this rank. ``keep_bytes``, ``recompute_bytes``, ``stored_bytes``: by block.

    ``keep_bytes`` is what the block would hold (or holds) under ``keep``, ``recompute_bytes`` under ``recompute``,
    ``stored_bytes`` under the storage in force, in as many forwards as wait for their backward at once:
    ``forwards_in_flight``, which is 1 but for pipelines. ``held_bytes`` is the most that was held at once;
    ``peak_bytes`` adds what a recomputation brings back while its block is in backward.
    """

    keep_bytes: tuple[int, ...]
    recompute_bytes: tuple[int, ...]
    stored_bytes: tuple[int, ...]
    held_bytes: int
    peak_bytes: int
    forwards_in_flight: int = 1


class Ledger:
    """Counts one step: enter ``forward`` around the model's forward, ``block`` around each block's storage."""

    def __init__(self, blocks: int) -> None:
        self._refs: dict[int, int] = {}
        self._saved_bytes = 0
        self._storages: dict[int, Storage] = {}
        self._held_bytes = 0
        self._peak_bytes = 0
        self._keep = _PerForward(blocks)
        self._recompute = _PerForward(blocks)
        self._stored = _PerForward(blocks)
        self._hooks: saved_tensors_hooks | None = None
        self.forward: _Forward | None = None
        self._in_flight: weakref.WeakSet[_Forward] = weakref.WeakSet()
        self._most_in_flight = 1

    @staticmethod
    def available() -> bool:
        """False where the caller has forbidden saved-tensor hooks, which the count needs."""
        return bool(_autograd._saved_tensors_hooks_is_enabled())  # type: ignore[attr-defined]

    def begin_forward(self) -> None:
        """Start counting a forward of the model; a step has one for each micro-batch."""
        if self._hooks is None:
            self._hooks = saved_tensors_hooks(self._pack, _unpack)
            self._hooks.__enter__()
            self.forward = _Forward()
            self._in_flight.add(self.forward)

    def end_forward(self) -> None:
        """Stop counting what is saved; what was counted stays so until it is freed."""
        if self._hooks is not None and self.forward is not None:
            self._hooks.__exit__(None, None, None)
            for per_block in (self._keep, self._recompute, self._stored):
                per_block.close(self.forward)
            self._hooks = self.forward = None
            self._most_in_flight = max(self._most_in_flight, len(self._in_flight))

    def run(self, index: int, storage: Storage, forward: Forward, args: Any, kwargs: Any) -> Any:
        """Call ``storage.run(forward, *args, **kwargs)`` for the block at ``index`` and book its bytes."""
        inputs = self._new_bytes(tree_leaves((args, kwargs)))
        self._storages[index] = storage
        before = self.live_bytes
        inside = _Inside(self)
        storage.account.watch(self.note_working_set)

        def metered(*args: Any, **kwargs: Any) -> Any:
            with inside.counted():
                return forward(*args, **kwargs)

        result = storage.run(metered, *args, **kwargs)
        inside.first = False
        self._stored.add(index, self.live_bytes - before)
        self._held_bytes = max(self._held_bytes, self.live_bytes)
        self._recompute.add(index, inputs)
        self._keep.add(index, inside.bytes)
        return result

    @property
    def live_bytes(self) -> int:
        """Held now: what autograd saves, and what the storages hold by themselves."""
        return self._saved_bytes + sum(storage.held_bytes for storage in self._storages.values())

    def measurement(self) -> Measurement:
        """What was counted, to be read at the end of the step."""
        return Measurement(
            keep_bytes=self._keep.most(),
            recompute_bytes=self._recompute.most(),
            stored_bytes=self._stored.most(),
            held_bytes=self._held_bytes,
            peak_bytes=max(self._held_bytes, self._peak_bytes),
            forwards_in_flight=self._most_in_flight,
        )

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether this tensor's storage is counted now."""
        return part_of(tensor).untyped_storage()._cdata in self._refs

    def note_working_set(self, extra_bytes: int) -> None:
        """Backward has ``extra_bytes`` of a block on top of what is held."""
        self._peak_bytes = max(self._peak_bytes, self.live_bytes + extra_bytes)

    def _new_bytes(self, leaves: Sequence[Any]) -> int:
        storages = [
            part_of(leaf).untyped_storage()
            for leaf in leaves
            if isinstance(leaf, torch.Tensor) and _countable(leaf) and not self.holds(leaf)
        ]
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    def _pack(self, tensor: torch.Tensor) -> Any:
        # An output that kept its history would keep the node that saves it alive, and itself with it.
        return _Held(tensor.detach(), self) if _countable(tensor) else tensor

    def _acquire(self, key: int, size_bytes: int) -> None:
        count = self._refs.get(key, 0)
        self._refs[key] = count + 1
        if count == 0:
            self._saved_bytes += size_bytes
            self._held_bytes = max(self._held_bytes, self.live_bytes)

    def _release(self, key: int, size_bytes: int) -> None:
        count = self._refs[key] - 1
        if count:
            self._refs[key] = count
        else:
            del self._refs[key]
            self._saved_bytes -= size_bytes


class _Forward:
    """A forward of the model, in flight for as long as something that was saved in it refers to this object."""

    __slots__ = ("__weakref__",)


class _Held:
    """A saved tensor that is counted for as long as autograd holds this object."""

    __slots__ = ("_forward", "_key", "_ledger", "_size_bytes", "_tensor", "_version")

    def __init__(self, tensor: torch.Tensor, ledger: Ledger) -> None:
        storage = part_of(tensor).untyped_storage()
        self._tensor = tensor
        self._version = tensor._version
        self._ledger = ledger
        self._forward = ledger.forward
        self._key = storage._cdata
        self._size_bytes = storage.nbytes()
        ledger._acquire(self._key, self._size_bytes)

    def __del__(self) -> None:
        self._ledger._release(self._key, self._size_bytes)

    def tensor(self) -> torch.Tensor:
        # A saved tensor with hooks escapes autograd's own version check.
        if self._tensor._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{tuple(self._tensor.shape)} {self._tensor.dtype} is at version {self._tensor._version}; "
                f"expected version {self._version} instead"
            )
        return self._tensor


class _Inside:
    """What is saved inside one block's forward, whatever its storage then does with it."""

    def __init__(self, ledger: Ledger) -> None:
        self.first = True
        self.bytes = 0
        self._ledger = ledger

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the storages saved meanwhile; a rerun in backward is reported as a working set."""
        top = _autograd._top_saved_tensors_default_hooks(False)
        if top is None:
            yield
            return
        pack, unpack = top
        forward = self._ledger.forward
        seen: dict[StorageWeakRef, int] = {}

        def count(tensor: torch.Tensor) -> Any:
            if _countable(tensor) and (self.first or not self._ledger.holds(tensor)):
                # The weak reference keeps the storage's identity from being used again while it is in `seen`.
                storage = part_of(tensor).untyped_storage()
                seen.setdefault(StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]
            return pack(tensor), forward

        def restore(packed: Any) -> torch.Tensor:
            tensor: torch.Tensor = unpack(packed[0])
            self._ledger.note_working_set(0)  # a storage may hold more now: what it has brought back
            return tensor

        try:
            with saved_tensors_hooks(count, restore):
                yield
        finally:
            if self.first:
                self.bytes += sum(seen.values())
            else:
                self._ledger.note_working_set(sum(seen.values()))


class _PerForward:
    """Bytes by block: summed over the calls within a forward of the model and over the forwards in flight; the most."""

    def __init__(self, blocks: int) -> None:
        self._now = [0] * blocks
        self._most = [0] * blocks
        self._in_flight: weakref.WeakKeyDictionary[_Forward, list[int]] = weakref.WeakKeyDictionary()

    def add(self, index: int, value: int) -> None:
        self._now[index] += value

    def close(self, forward: _Forward) -> None:
        self._in_flight[forward] = self._now
        together = [sum(values) for values in zip(*self._in_flight.values(), strict=True)]
        self._most = [max(pair) for pair in zip(self._most, together, strict=True)]
        self._now = [0] * len(self._now)

    def most(self) -> tuple[int, ...]:
        return tuple(self._most)


def _unpack(held: Any) -> torch.Tensor:
    return held.tensor() if isinstance(held, _Held) else held


def _countable(tensor: torch.Tensor) -> bool:
    part = part_of(tensor)
    return not is_parameter(tensor) and type(part) is torch.Tensor and part.layout is torch.strided
