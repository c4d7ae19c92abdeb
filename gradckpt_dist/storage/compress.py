"""``compress8`` and ``compress4``: what backward will need is held in 8 or 4 bits a value."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch._C import _DisableTorchDispatch, _functorch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from gradckpt_dist.errors import StorageError
from gradckpt_dist.storage.base import Forward, Storage
from gradckpt_dist.storage.choice import Choice, SeenOperations, UnseenOperations
from gradckpt_dist.storage.compiled import is_compiled
from gradckpt_dist.storage.context import StorageContext
from gradckpt_dist.storage.ledger import is_parameter
from gradckpt_dist.storage.lineage import Lineage, Role
from gradckpt_dist.storage.noise import NoiseSource
from gradckpt_dist.storage.parts import Shell, arrived, is_distributed
from gradckpt_dist.storage.quantiser import DTYPES, Quantised, dequantise, quantise
from gradckpt_dist.storage.recipe import Derivation, Key, Layout, Recipes
from gradckpt_dist.storage.saved import (
    Account,
    Kept,
    VersionCheck,
    is_movable,
    is_plain,
    without_memory,
)

_STATISTIC_FRACTION = 1 / 32
"""A storage this much smaller than the largest one that was saved holds a statistic, and its bytes do not matter."""
_ATTENTION_BITS = 8


class Compress8(Storage):
    """Quantises each saved activation once, when the block's forward is over, and restores it when backward asks.

    What a cheap operation (a norm, GELU, SiLU, a product, a cast, a copy) has made of tensors that are saved as well is
    not held at all, but made of these again. Until the forward is over the block holds what ``keep`` holds. As they are
    stay: parameters, buffers, what was made of these alone (weights cast by autocast), what is not float32, float16 or
    bfloat16, small and expanded tensors, tensor subclasses but DTensor, statistics, inputs of the block that need no
    gradient and what was made of these alone, and on the CPU tensors with a value that is not finite. Of a DTensor,
    this rank's part is quantised; its placements stay. In a compiled block, where the operations cannot be seen,
    everything else that is saved and large counts as an activation.

    A gradient of the gradient would be wrong without bound: ``create_graph`` and torch.func raise ``StorageError``.
    """

    name = "compress8"
    exact = False
    reruns = False
    bits: ClassVar[int] = 8

    def __init__(self, block: nn.Module, noise: NoiseSource) -> None:
        super().__init__(block)
        self._noise = noise
        self._account = Account()

    @classmethod
    def create(cls, block: nn.Module, context: StorageContext) -> Self:
        return cls(block, context.noise)

    @property
    def held_bytes(self) -> int:
        """Bytes held now for backward, compressed or not, each storage once, parameters excluded."""
        return self._account.held_bytes

    def run(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        call = CompressedCall(self.name, self._account)
        inputs = tree_leaves((args, kwargs))
        lineage = None if is_compiled(self.block) else Lineage(self.block, inputs)
        with call.hooks(), lineage or nullcontext():
            result = forward(*args, **kwargs)
        choice = SeenOperations(lineage) if lineage is not None else UnseenOperations(self.block, inputs)
        call.seal(choice, self.bits, self._noise)
        return result


class Compress4(Compress8):
    """The same in 4 bits, stochastically rounded; queries, keys and values of attention in 8.

    Attention's backward divides by a saved log-sum-exp that no longer matches them. In a compiled block they are told
    by their shape: [batch, heads, tokens, width] beside a log-sum-exp [batch, heads, tokens].
    """

    name = "compress4"
    bits = 4


class _Place:
    """One saved storage, alive for as long as a node has it saved.

    As it is (``sample``), and after ``seal`` perhaps as codes, or as what makes it from other places.
    """

    __slots__ = ("__weakref__", "_account", "_check", "_kept", "_lent", "_rest", "_restored", "as_is", "sample")

    def __init__(self, tensor: Tensor, check: VersionCheck, account: Account) -> None:
        self.sample: Tensor | None = tensor
        """The tensor that was saved first; None once it is held otherwise."""
        self.as_is = False
        """Whether a view of it forbids to compress it."""
        self._check = check
        self._account = account
        self._kept: Kept | None = Kept(tensor.untyped_storage().nbytes(), account)
        self._rest: Quantised | Derivation | None = None
        self._restored: StorageWeakRef | None = None
        self._lent: torch.UntypedStorage | None = None

    @property
    def changed(self) -> bool:
        """Whether its storage was written to since it was saved."""
        return self._check.changed

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
        """The storage again; one that is still alive is not restored twice."""
        storage, new = self._fresh()
        if new:
            self._restored = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._lent = None
        return storage

    def lend(self, *, overwritten: bool) -> tuple[torch.UntypedStorage, bool]:
        """For a derivation: the storage, and whether nobody else has it.

        The operation that a derived tensor came from is the next to be differentiated, and asks for it, too.
        """
        if overwritten:
            return self._fresh()
        self._lent = storage = self.restored()
        return storage, False

    def _fresh(self) -> tuple[torch.UntypedStorage, bool]:
        if self.sample is not None:
            self._check.verify()
            return self.sample.untyped_storage(), False
        alive = self._restored and torch.UntypedStorage._new_with_weak_ptr(self._restored.cdata)
        if alive:
            return alive, False
        rest = self._rest
        if isinstance(rest, Derivation):
            return rest.make(), True
        return dequantise(rest).untyped_storage(), True  # type: ignore[arg-type]

    def _hold(self, rest: Quantised | Derivation) -> None:
        self._rest = rest
        self._kept = Kept(rest.size_bytes, self._account)
        self.sample = None


class _Saved:
    """A saved tensor: a view of a ``_Place``, or without one itself."""

    __slots__ = ("_check", "_layout", "_name", "_place", "_shell", "_tensor")

    def __init__(self, name: str, tensor: Tensor, check: VersionCheck, place: _Place | None, witness: Tensor) -> None:
        self._name = name
        self._check = check
        self._place = place
        self._layout = Layout.of(tensor) if place is not None else None
        self._tensor = witness
        self._shell = Shell(witness) if place is not None and is_distributed(witness) else None

    def tensor(self) -> Tensor:
        self._check.verify()
        refuse_double_backward(self._name)
        if self._place is None or self._layout is None:
            return self._tensor
        tensor = self._layout.view(self._place.restored())
        return tensor if self._shell is None else self._shell.around(tensor)


class CompressedCall:
    """One forward of one block.

    Raises:
        StorageError: inside a torch.func transform.
    """

    def __init__(self, name: str, account: Account) -> None:
        if _functorch.peek_interpreter_stack() is not None:
            raise StorageError(
                f"{name!r} cannot run under torch.func transforms (grad, vmap, jvp), which differentiate what it "
                "approximates; use an exact storage for this block: keep, recompute, selective or offload"
            )
        self._name = name
        self._account = account
        # The weak references to storages keep their identities from being used again while they are keys.
        self._places: dict[Key, tuple[StorageWeakRef, weakref.ref[_Place]]] = {}

    def hooks(self) -> saved_tensors_hooks:
        """What is saved under these waits here for ``seal``."""
        return saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> _Saved:
        if type(tensor) is not Tensor:
            return self._held(tensor)
        with _DisableTorchDispatch():  # nothing of ours is one of the block's operations
            return self._held(tensor)

    def _held(self, tensor: Tensor) -> _Saved:
        if is_parameter(tensor):
            # The object itself: ZeRO-3 swaps the memory behind it.
            return _Saved(self._name, tensor, VersionCheck(tensor, tensor), None, tensor)
        # An output that kept its history would keep the node that saves it alive, and itself with it.
        tensor = tensor.detach()
        part = arrived(tensor)
        if not is_plain(part):
            return _Saved(self._name, tensor, VersionCheck(tensor, tensor), None, tensor)
        witness = without_memory(tensor if is_distributed(tensor) else part)
        check = VersionCheck(tensor, witness)
        place = self._place(part, check)
        if not is_movable(part) or (place.sample is not None and place.sample.dtype != part.dtype):
            place.as_is = True
        return _Saved(self._name, part, check, place, witness)

    def seal(self, choice: Choice, bits: int, noise: NoiseSource) -> None:
        """End of the forward: of what is still saved, hold what ``choice`` says as codes or as what makes it."""
        alive = {key: place for key, (_, reference) in self._places.items() if (place := reference()) is not None}
        roles = _roles(list(alive.values()), choice)
        self._places.clear()
        # What is made of others goes first: codes are the more memory while their originals are there.
        coded = {
            place: role
            for key, place in alive.items()
            if (role := roles.get(place)) is not None
            and (role is Role.ATTENDED or not _derived(key, place, alive, choice.recipes))
        }
        for place, role in coded.items():
            place.compress(max(bits, _ATTENTION_BITS) if role is Role.ATTENDED else bits, noise)

    def _place(self, tensor: Tensor, check: VersionCheck) -> _Place:
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor._version)
        known = self._places[key][1]() if key in self._places else None
        if known is not None:
            return known
        place = _Place(tensor, check, self._account)
        self._places[key] = (StorageWeakRef(storage), weakref.ref(place))  # type: ignore[no-untyped-call]
        return place


def _roles(places: list[_Place], choice: Choice) -> dict[_Place, Role]:
    """Of those that may be compressed; no sample outlives the call."""
    samples = [place.sample for place in places if place.sample is not None]
    largest_bytes = max((sample.untyped_storage().nbytes() for sample in samples), default=0)
    found = {}
    for place in places:
        sample = place.sample
        if sample is None or place.as_is or not _is_compressible(sample, largest_bytes):
            continue
        role = choice.role(sample, samples)
        if role is not None:
            found[place] = role
    return found


def _derived(key: Key, place: _Place, alive: dict[Key, _Place], recipes: Recipes | None) -> bool:
    """Whether from now on this place is made from the others."""
    if recipes is None or place.changed:
        return False

    def find(source: Key) -> _Place | None:
        found = alive.get(source)
        return None if found is None or found.changed else found

    derivation = recipes.bind(key, find)
    if derivation is None:
        return False
    place.derive(derivation)
    return True


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


def _is_compressible(tensor: Tensor, largest_bytes: int) -> bool:
    size_bytes = tensor.untyped_storage().nbytes()
    return (
        tensor.dtype in DTYPES
        and size_bytes % tensor.itemsize == 0
        and size_bytes >= largest_bytes * _STATISTIC_FRACTION
    )


def _flat(tensor: Tensor) -> Tensor:
    """All of the storage."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor()
