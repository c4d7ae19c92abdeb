"""Outputs of chosen operations, held from a block's forward to its run in backward.

PyTorch's own selective checkpointing counts every operation and expects the same ones again. Frameworks that gather
weights inside a forward (ZeRO-3) run other operations the second time, and write in place into what was saved. So here
only chosen operations are compared, by operator, shapes, parameters and other arguments; one that is not found is run
again; and an output about to be written to is copied first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch._C._autograd import _make_saved_tensor, _top_saved_tensors_default_hooks
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gradckpt_dist.errors import StorageError
from gradckpt_dist.storage.lineage import Role
from gradckpt_dist.storage.operations import Occurrence, Operation, inner_tensors, storage_key


class Held(Protocol):
    """A tensor that is held, such as ``SavedTensor``."""

    def unpack(self) -> torch.Tensor:
        """The tensor again.

        Raises:
            RuntimeError: it was changed in place since.
        """


Save = Callable[["Entry", int, torch.Tensor], Held]
"""Holds one tensor of an entry's output, which is at the given position."""


class Entry:
    """One call that is compared and, if its output is held, the output."""

    __slots__ = (
        "_saved",
        "_spec",
        "fixed",
        "leaves",
        "occurrence",
        "operation",
        "packs",
        "random_state",
        "role",
        "seconds",
    )

    def __init__(self, operation: Operation, occurrence: Occurrence, packs: int) -> None:
        self.operation = operation
        self.occurrence = occurrence
        self.packs = packs
        """Tensors that autograd had saved when this call had run."""
        self.leaves: list[Any] | None = None
        """The output during the forward: aliases that autograd does not know."""
        self.fixed = False
        """Whether it is held whatever the selection says."""
        self.role: Role | None = None
        """What the first tensor of the output is, as far as a lossy storage has to know."""
        self.seconds: Callable[[], float] | None = None
        self.random_state: tuple[torch.device, torch.Tensor] | None = None
        self._spec: TreeSpec | None = None
        self._saved: list[tuple[Any, Any]] | None = None

    def fill(self, output: Any) -> None:
        leaves, self._spec = ([output], None) if isinstance(output, torch.Tensor) else tree_flatten(output)
        if all(leaf.layout is torch.strided for leaf in leaves if isinstance(leaf, torch.Tensor)):
            self.leaves = [_alias(leaf) for leaf in leaves]

    def copy_leaf(self, index: int) -> None:
        """Hold a copy of its own of one output from now on."""
        if self.leaves is not None:
            strides = self.leaves[index].stride()
            self.leaves[index] = self.leaves[index].clone()
            if self.leaves[index].stride() != strides:
                self.drop()

    def save(self, hold: Save) -> None:
        """End of the forward: hold the output as autograd holds a saved tensor."""
        if self.leaves is not None:
            self._saved = [
                (hold(self, position, leaf), leaf.stride()) if isinstance(leaf, torch.Tensor) else (leaf, None)
                for position, leaf in enumerate(self.leaves)
            ]
            self.leaves = None

    def take(self) -> tuple[Any] | None:
        """The output, which is not held any longer; None if there is none, or it was changed since."""
        saved, spec = self._saved, self._spec
        self._saved = None
        if saved is None:
            return None
        try:
            with torch.no_grad():
                leaves = [held if stride is None else held.unpack() for held, stride in saved]
        except RuntimeError:  # written to after the forward
            return None
        # The caller's own hooks may have changed a layout.
        if any(stride is not None and leaf.stride() != stride for leaf, (_, stride) in zip(leaves, saved, strict=True)):
            return None
        if self.random_state is not None:
            set_random_state(*self.random_state)
        return (leaves[0] if spec is None else tree_unflatten(leaves, spec),)

    def drop(self) -> None:
        self.leaves = self._saved = None


class _Line:
    """The calls with one signature, in order."""

    __slots__ = ("entries", "given", "needed", "position")

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.needed = 0
        self.position = 0
        self.given = False


class OperationCache:
    """The compared calls of one forward of a block."""

    def __init__(self) -> None:
        self.packs = 0
        """Tensors that autograd has saved in this forward so far."""
        self.given = 0
        """Outputs given back in the run in backward that has come last."""
        self._lines: dict[tuple[Any, ...], _Line] = {}
        self._counts: dict[Any, int] = {}
        self._owners: dict[int, list[tuple[Entry, int]]] = {}

    def entries(self) -> Iterator[Entry]:
        """All calls, those with the same signature together."""
        for line in self._lines.values():
            yield from line.entries

    @contextmanager
    def counting(
        self, seen: Callable[[torch.Tensor], None] | None = None, asked: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """Count, and show to ``seen``, what is saved inside for the hooks that are in force outside.

        ``asked`` is called each time that backward asks for one of these tensors.
        """
        top = _top_saved_tensors_default_hooks(False)
        if top is None:
            yield
            return
        pack, unpack = top

        def count(tensor: torch.Tensor) -> Any:
            self.packs += 1
            if seen is not None:
                seen(tensor)
            return pack(tensor)

        def restore(packed: Any) -> torch.Tensor:
            if asked is not None:
                asked()
            tensor: torch.Tensor = unpack(packed)
            return tensor

        with saved_tensors_hooks(count, unpack if asked is None else restore):
            yield

    def occurrence(self, function: Any) -> Occurrence:
        """Numbers the considered calls of each operator."""
        count = self._counts.get(function, 0)
        self._counts[function] = count + 1
        return function, count

    def add(self, call: tuple[Any, ...], operation: Operation, occurrence: Occurrence) -> Entry:
        """Note a call that has just run."""
        entry = Entry(operation, occurrence, self.packs)
        self._lines.setdefault(call, _Line()).entries.append(entry)
        return entry

    def hold(self, entry: Entry, output: Any) -> None:
        """Hold the output of a call for as long as nobody changes it."""
        entry.fill(output)
        for index, leaf in enumerate(entry.leaves or ()):
            if isinstance(leaf, torch.Tensor):
                for tensor in (leaf,) if type(leaf) is torch.Tensor else inner_tensors(leaf):
                    self._owners.setdefault(storage_key(tensor), []).append((entry, index))

    def before_write(self, tensors: list[torch.Tensor]) -> None:
        """Copy what is held of storages that are about to be written to."""
        if self._owners:
            for tensor in tensors:
                for entry, index in self._owners.pop(storage_key(tensor), ()):
                    entry.copy_leaf(index)

    def seal(self, hold: Save) -> None:
        """End of the forward: drop what backward will not come to, hold the rest."""
        self._owners.clear()
        for line in self._lines.values():
            for entry in line.entries:
                # Checkpoint stops its run when it has all that was saved: what was run after that is not asked for.
                if entry.packs < self.packs:
                    line.needed += 1
                    entry.save(hold)
                else:
                    entry.drop()

    def rewind(self) -> None:
        """Start of a run in backward."""
        self.given = 0
        for line in self._lines.values():
            line.position, line.given = 0, False

    def take(self, call: tuple[Any, ...]) -> tuple[Any] | None:
        """The output of this call; None if it has to be run."""
        line = self._lines.get(call)
        if line is None:
            return None
        position = line.position
        line.position += 1
        if position >= len(line.entries):
            return None
        found = line.entries[position].take()
        if found is not None:
            line.given = True
            self.given += 1
        return found

    def finish(self) -> None:
        """End of a run in backward: drop the rest.

        Raises:
            StorageError: outputs may have been given to other calls than those that they came from.
        """
        for call, line in self._lines.items():
            for entry in line.entries:
                entry.drop()
            if line.given and not line.needed <= line.position <= len(line.entries):
                raise StorageError(
                    f"the block called {call[0]} with the same shapes and arguments {line.needed} times in its forward "
                    f"and {line.position} times when it was run again, so that their outputs cannot be told apart; "
                    "use keep or recompute for this block, or make its forward do the same each time"
                )


def save(entry: Entry, position: int, tensor: torch.Tensor) -> Held:
    """Hold a tensor under the saved-tensor hooks in force, which treat it like those that autograd saves."""
    return _make_saved_tensor(tensor, is_output=False)


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


def _alias(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    # Keeps the version counter shared with the original, which a plain detach below autograd would not.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return leaf.detach()
