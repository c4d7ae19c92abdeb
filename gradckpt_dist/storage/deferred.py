"""What a block saves, held back until the forward is done with it: then it is known how each storage may be held."""

from __future__ import annotations

import weakref
from functools import cache

import torch
from torch import Tensor
from torch._C import _DisableTorchDispatch, _functorch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from gradckpt_dist.errors import StorageError
from gradckpt_dist.storage.ledger import is_parameter
from gradckpt_dist.storage.noise import NoiseSource
from gradckpt_dist.storage.parts import Shell, arrived, is_distributed
from gradckpt_dist.storage.quantiser import Quantised, dequantise, quantise
from gradckpt_dist.storage.recipe import Derivation, Key, Layout, Recipes
from gradckpt_dist.storage.saved import (
    Account,
    Kept,
    VersionCheck,
    is_movable,
    is_plain,
    without_memory,
)

STATISTIC_FRACTION = 1 / 32
"""What is smaller, so much smaller than the largest that a block saves, holds a statistic: its bytes do not matter."""


class Place:
    """One saved storage, alive for as long as a node has it saved.

    As it is (``sample``), and once the forward is done with it perhaps as codes, or as what makes it from others.
    """

    __slots__ = (
        "__weakref__",
        "_account",
        "_check",
        "_kept",
        "_lent",
        "_rest",
        "_restored",
        "_size_bytes",
        "as_is",
        "sample",
        "unread",
    )

    def __init__(self, tensor: Tensor, check: VersionCheck, account: Account) -> None:
        self.sample: Tensor | None = tensor
        """The tensor that was saved first; None once it is held otherwise."""
        self.as_is = False
        """Whether a view of it forbids to compress it."""
        self.unread = 0
        """How many saved tensors are views of it and have not been asked for yet."""
        self._check = check
        self._account = account
        self._size_bytes = tensor.untyped_storage().nbytes()
        self._kept: Kept | None = Kept(self._size_bytes, account)
        self._rest: Quantised | Derivation | None = None
        self._restored: StorageWeakRef | None = None
        self._lent: torch.UntypedStorage | None = None

    @property
    def changed(self) -> bool:
        """Whether its storage was written to since it was saved."""
        return self._check.changed

    def is_idle(self, identity: int) -> bool:
        """Whether the sample is all that is left of its storage outside of autograd: nothing will read or write it."""
        return self.sample is not None and torch._C._storage_Use_Count(identity) <= _least_uses()

    @property
    def sample_bytes(self) -> int:
        """Of the storage while it is held as it is; 0 once it is not."""
        return 0 if self.sample is None else self._size_bytes

    def compress(self, bits: int, noise: NoiseSource) -> None:
        """Hold codes from now on, where all values are finite."""
        if self.sample is None or self.changed:
            return
        quantised = quantise(_flat(self.sample), bits, noise)
        if quantised is not None:
            self._hold(quantised)

    def derive(self, derivation: Derivation) -> None:
        """Hold only what it is made of from now on."""
        self._hold(derivation)

    def restored(self) -> torch.UntypedStorage:
        """The storage again, for one of those that saved it.

        It is held until each of them has asked: queries, keys and values are often made of one tensor by three nodes.
        """
        storage = self._again()
        self.unread -= 1
        self._lent = storage if self.unread > 0 else None
        return storage

    def lend(self, *, overwritten: bool) -> tuple[torch.UntypedStorage, bool]:
        """For a derivation: the storage, and whether nobody else has it.

        The operation that a derived tensor came from is the next to be differentiated, and asks for it, too: until then
        it is held, if it is not ``overwritten`` or there is room for both.
        """
        if overwritten and self._account.slack.bytes < self._size_bytes:
            return self._fresh()
        self._lent = storage = self._again()
        return storage, False

    def _again(self) -> torch.UntypedStorage:
        """The storage; one that is still alive is not restored twice."""
        storage, new = self._fresh()
        if new:
            self._restored = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        return storage

    def _fresh(self) -> tuple[torch.UntypedStorage, bool]:
        if self.sample is not None:
            self._check.verify()
            return self.sample.untyped_storage(), False
        alive = self._restored and torch.UntypedStorage._new_with_weak_ptr(self._restored.cdata)
        if alive:
            return alive, False
        rest = self._rest
        storage = rest.make() if isinstance(rest, Derivation) else dequantise(rest).untyped_storage()  # type: ignore[arg-type]
        self._account.restored(storage)
        return storage, True

    def _hold(self, rest: Quantised | Derivation) -> None:
        self._rest = rest
        self._kept = Kept(rest.size_bytes, self._account)
        self.sample = None


class _Saved(VersionCheck):
    """A saved tensor: a view of a ``Place``, or without one its own witness."""

    __slots__ = ("_layout", "_lossy", "_place", "_shell")

    def __init__(self, lossy: str | None, tensor: Tensor, witness: Tensor, place: Place | None = None) -> None:
        super().__init__(tensor, witness)
        self._lossy = lossy
        self._place = place
        self._layout = Layout.of(tensor) if place is not None else None
        self._shell = Shell(witness) if place is not None and is_distributed(witness) else None

    def tensor(self) -> Tensor:
        self.verify()
        if self._lossy is not None:
            refuse_double_backward(self._lossy)
        if self._place is None or self._layout is None:
            return self._witness
        tensor = self._layout.view(self._place.restored())
        return tensor if self._shell is None else self._shell.around(tensor)


class DeferredCall:
    """One forward of one block. What is held is found by ``end``, and may be held otherwise from then on.

    ``lossy``: whether the storage of that name will hold something approximately.

    Raises:
        StorageError: inside a torch.func transform.
    """

    def __init__(self, name: str, account: Account, *, lossy: bool) -> None:
        refuse_transforms(name)
        self._lossy = name if lossy else None
        self._account = account
        # The weak references to storages keep their identities from being used again while they are keys.
        self._places: dict[Key, tuple[StorageWeakRef, weakref.ref[Place]]] = {}
        self._in_use: dict[Key, None] = {}
        self._largest_bytes = 0

    def hooks(self) -> saved_tensors_hooks:
        """What is saved under these waits here for ``end``."""
        return saved_tensors_hooks(self._pack, _unpack)

    @property
    def least_bytes(self) -> float:
        """Storages below that hold statistics, by the largest that was saved so far."""
        return self._largest_bytes * STATISTIC_FRACTION

    def before_saving(self) -> None:
        """Something else than parameters and what is saved already is about to be saved."""

    def _pack(self, tensor: Tensor) -> _Saved:
        if is_parameter(tensor):
            # The object itself: ZeRO-3 swaps the memory behind it.
            return _Saved(self._lossy, tensor, tensor)
        if type(tensor) is not Tensor:
            self.before_saving()
            return self._held(tensor)
        if tensor.layout is not torch.strided or _key(tensor) not in self._places:
            self.before_saving()
        with _DisableTorchDispatch():  # nothing of ours is one of the block's operations
            return self._held(tensor)

    def _held(self, tensor: Tensor) -> _Saved:
        # An output that kept its history would keep the node that saves it alive, and itself with it.
        tensor = tensor.detach()
        part = arrived(tensor)
        if not is_plain(part):
            return _Saved(self._lossy, tensor, tensor)
        witness = without_memory(tensor if is_distributed(tensor) else part)
        place = self._place(part, witness)
        if not is_movable(part) or (place.sample is not None and place.sample.dtype != part.dtype):
            place.as_is = True
        return _Saved(self._lossy, part, witness, place)

    def newly_idle(self) -> list[tuple[Key, Place]]:
        """What has become idle since this was last asked."""
        found = []
        for key in list(self._in_use):
            place = self._places[key][1]()
            if place is not None and not place.is_idle(key[0]):
                continue
            del self._in_use[key]
            if place is not None:
                found.append((key, place))
        return found

    def saved(self) -> dict[Key, Place]:
        """What is saved now, by storage."""
        return {key: place for key, (_, reference) in self._places.items() if (place := reference()) is not None}

    def end(self) -> dict[Key, Place]:
        """The forward is over: what is still saved, by storage."""
        alive = self.saved()
        self._places.clear()
        self._in_use.clear()
        return alive

    def _place(self, tensor: Tensor, witness: Tensor) -> Place:
        key = _key(tensor)
        place = self._places[key][1]() if key in self._places else None
        if place is None:
            place = Place(tensor, VersionCheck(tensor, witness), self._account)
            self._largest_bytes = max(self._largest_bytes, place.sample_bytes)
            self._places[key] = (StorageWeakRef(tensor.untyped_storage()), weakref.ref(place))  # type: ignore[no-untyped-call]
            self._in_use[key] = None
        place.unread += 1
        return place


def derive(key: Key, place: Place, alive: dict[Key, Place], recipes: Recipes | None) -> bool:
    """Have this place made from the others from now on; whether that can be done."""
    if recipes is None or place.changed:
        return False

    def find(source: Key) -> Place | None:
        found = alive.get(source)
        return None if found is None or found.changed else found

    derivation = recipes.bind(key, find)
    if derivation is None:
        return False
    place.derive(derivation)
    return True


def refuse_transforms(name: str) -> None:
    """Called in forward.

    Raises:
        StorageError: inside a torch.func transform.
    """
    if _functorch.peek_interpreter_stack() is not None:
        raise StorageError(
            f"{name!r} cannot run under torch.func transforms (grad, vmap, jvp), which differentiate past what it "
            "holds; use another storage for this block: keep, recompute, selective or offload"
        )


def refuse_double_backward(name: str) -> None:
    """Called in backward, where gradients are on if it is to be differentiated itself.

    Raises:
        StorageError: they are.
    """
    if torch.is_grad_enabled():
        raise StorageError(
            f"{name!r} holds what it saved only approximately, so that gradients of gradients (create_graph=True) "
            "through its block would be wrong; use an exact storage for it: keep, recompute, selective or offload"
        )


@cache
def _least_uses() -> int:
    """How many references a storage has that one tensor has."""
    tensor = torch.empty(1, device="cpu")
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _key(tensor: Tensor) -> Key:
    return tensor.untyped_storage()._cdata, tensor._version


def _flat(tensor: Tensor) -> Tensor:
    """All of the storage."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor()
