"""Outputs of chosen operations, held from a block's forward to its run in backward.

PyTorch's own selective checkpointing counts every operation and expects the same ones again. Frameworks that gather
weights inside a forward (ZeRO-3) run other operations the second time, and write in place into what was saved. So here
only chosen operations are compared, in their order, by operator, shapes and arguments; one that is not found is run
again; and an output about to be written to is copied first. Whatever happens, a wrong match costs time, not the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gradckpt_dist.storage.operations import (
    Kind,
    Operation,
    describe,
    gathers_parameter,
    inner_tensors,
    signature,
    storage_key,
    written,
)

_ALWAYS_SAVED = (Kind.COMMUNICATION, Kind.ROUTING)


class Selection(Protocol):
    """Which operations are held, beside those of communication and routing."""

    def tracks(self, function: Any, operation: Operation) -> bool:
        """Whether calls of this operator are compared on the run in backward."""

    def keeps(self, ordinal: int) -> bool:
        """Whether the output of the tracked call with this number, from 0, is held."""


class Hold(Protocol):
    """How an output survives until it is taken; the exact one is the tensor itself."""

    def hold(self, tensor: torch.Tensor) -> Any:
        """What to keep in place of ``tensor``; called once, when the block's forward has ended."""

    def release(self, held: Any) -> torch.Tensor:
        """The tensor again: same shape, strides, dtype and device."""


class HoldExact:
    """Holds the tensor itself."""

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def release(self, held: Any) -> torch.Tensor:
        tensor: torch.Tensor = held
        return tensor


class Entry:
    """One tracked call: its signature and, if its output is held, the output."""

    __slots__ = ("accounts", "hold", "leaves", "packs", "random_state", "signature", "spec", "versions")

    def __init__(self, call: tuple[Any, ...], packs: int, hold: Hold) -> None:
        self.signature = call
        self.packs = packs
        """Tensors that autograd had saved before this call had run."""
        self.hold = hold
        self.leaves: list[Any] | None = None
        self.spec: TreeSpec | None = None
        self.versions: list[int] = []
        self.random_state: tuple[torch.device, torch.Tensor] | None = None
        self.accounts: list[Any] = []

    def fill(self, output: Any) -> None:
        """Hold an output, by aliases that autograd does not know."""
        leaves, self.spec = tree_flatten(output)
        self.leaves = [_alias(leaf) for leaf in leaves]
        self.versions = [_version(leaf) for leaf in self.leaves]

    def copy_leaf(self, index: int) -> None:
        """Hold a copy of its own of one output from now on."""
        if self.leaves is not None:
            self.leaves[index] = self.leaves[index].clone()
            self.versions[index] = _version(self.leaves[index])

    def drop(self) -> None:
        self.leaves, self.spec, self.versions, self.accounts, self.random_state = None, None, [], [], None

    @property
    def unchanged(self) -> bool:
        """Whether no tensor has been written to since it was held."""
        return self.leaves is not None and self.versions == [_version(leaf) for leaf in self.leaves]


class OperationCache:
    """The tracked calls of one forward of a block, in order."""

    def __init__(self, hold: Hold, account: Callable[[torch.Tensor], Any] | None = None) -> None:
        self.entries: list[Entry] = []
        self.packs = 0
        """Tensors that autograd has saved in this forward so far."""
        self._hold = hold
        self._account = account
        self._owners: dict[int, list[tuple[Entry, int]]] = {}
        self._position = 0
        self._ordinal = 0

    def add(self, call: tuple[Any, ...], output: Any, *, keep: bool, exact: bool) -> Entry:
        """Note a call that has just run, and hold its output if asked to."""
        entry = Entry(call, self.packs, HoldExact() if exact else self._hold)
        self.entries.append(entry)
        if keep and _holdable(output):
            entry.fill(output)
            for index, leaf in enumerate(entry.leaves or ()):
                for tensor in inner_tensors(leaf):
                    self._owners.setdefault(storage_key(tensor), []).append((entry, index))
        return entry

    def before_write(self, tensors: list[torch.Tensor]) -> None:
        """Copy what is held of storages that are about to be written to."""
        if not self._owners:
            return
        for key in {storage_key(tensor) for tensor in tensors}:
            for entry, index in self._owners.pop(key, ()):
                entry.copy_leaf(index)

    def seal(self) -> None:
        """End of the forward: drop what backward will not come to, hold the rest."""
        self._owners.clear()
        for entry in self.entries:
            # Checkpoint stops its run when it has all that was saved, so what was run after that is never asked for.
            if entry.packs >= self.packs or not entry.unchanged:
                entry.drop()
                continue
            if self._account is not None:
                entry.accounts = [self._account(tensor) for tensor in inner_tensors(entry.leaves)]
            entry.leaves = [_apply(entry.hold.hold, leaf) for leaf in entry.leaves or ()]
            entry.versions = [_version(leaf) for leaf in entry.leaves]

    def rewind(self) -> None:
        """Start of a run in backward."""
        self._position = 0

    def take(self, call: tuple[Any, ...]) -> tuple[Any] | None:
        """The output of this call, which is not held any longer; None if it has to be run."""
        if self._position == len(self.entries) or self.entries[self._position].signature != call:
            return None
        entry = self.entries[self._position]
        self._position += 1
        if not entry.unchanged or entry.leaves is None or entry.spec is None:
            return None
        leaves, spec, random_state = entry.leaves, entry.spec, entry.random_state
        entry.drop()
        if random_state is not None:
            set_random_state(*random_state)
        output = tree_unflatten([_apply(entry.hold.release, leaf) for leaf in leaves], spec)
        return (output,)

    def next_ordinal(self) -> int:
        """Numbers the calls that a selection tracks."""
        self._ordinal += 1
        return self._ordinal - 1


class _CacheMode(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, cache: OperationCache, selection: Selection) -> None:
        super().__init__()
        self._cache = cache
        self._selection = selection

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions inside the block stay compiled; what they run is run again."""
        return True

    def _tracks(self, function: Any, operation: Operation, args: tuple[Any, ...]) -> bool:
        if operation.kind in _ALWAYS_SAVED:
            return operation.kind is not Kind.COMMUNICATION or not gathers_parameter(function, args)
        # Without gradients run custom functions' forwards, but also what frameworks do to weights in between.
        if operation.kind is Kind.CHEAP and not torch.is_grad_enabled():
            return False
        return operation.kind in (Kind.CHEAP, Kind.EXPENSIVE) and self._selection.tracks(function, operation)


class Recorder(_CacheMode):
    """Fills the cache while a block's forward runs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = describe(func)
        if operation.kind is Kind.WRITES:
            self._cache.before_write(written(func, args, kwargs))
        if not self._tracks(func, operation, args):
            return func(*args, **kwargs)
        always = operation.kind in _ALWAYS_SAVED
        keep = always or self._selection.keeps(self._cache.next_ordinal())
        before = random_state(args) if operation.random and keep else None
        output = self.execute(func, operation, args, kwargs)
        entry = self._cache.add(signature(func, args, kwargs), output, keep=keep, exact=always)
        if before is not None:
            after = random_state(args)
            if after is not None and not torch.equal(before[1], after[1]):
                entry.random_state = after
        return output

    def execute(self, function: Any, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a tracked operation."""
        return function(*args, **kwargs)


class Replayer(_CacheMode):
    """Answers from the cache while a block's forward runs again in backward."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._tracks(func, describe(func), args):
            found = self._cache.take(signature(func, args, kwargs))
            if found is not None:
                return found[0]
        return func(*args, **kwargs)


def random_state(args: Any) -> tuple[torch.device, torch.Tensor] | None:
    """State of the default generator of the device that these arguments are on."""
    device = next((tensor.device for tensor in inner_tensors(args)), None)
    if device is None:
        return None
    if device.type == "cpu":
        return device, torch.get_rng_state()
    return device, torch.get_device_module(device).get_rng_state(device)


def set_random_state(device: torch.device, state: torch.Tensor) -> None:
    """Bring the default generator of a device to this state."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def _holdable(output: Any) -> bool:
    leaves, _ = tree_flatten(output)
    return all(leaf.layout is torch.strided for leaf in leaves if isinstance(leaf, torch.Tensor))


def _apply(function: Callable[[Any], Any], leaf: Any) -> Any:
    return leaf if leaf is None or isinstance(leaf, int | float) else function(leaf)


def _alias(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    # Keeps the version counter shared with the original, which a plain detach below autograd would not.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return leaf.detach()


def _version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, torch.Tensor) else 0
