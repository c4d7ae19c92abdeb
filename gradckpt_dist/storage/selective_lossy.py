"""``selective8``, ``selective6``, ``selective4``: selective recomputation from inputs and outputs held as codes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from gradckpt_dist.storage.compress import CompressedCall
from gradckpt_dist.storage.deferred import refuse_double_backward
from gradckpt_dist.storage.ledger import is_parameter
from gradckpt_dist.storage.lineage import Role
from gradckpt_dist.storage.lossy import Lossy
from gradckpt_dist.storage.operation_cache import Entry, Held, OperationCache, save
from gradckpt_dist.storage.operations import Kind, Operation, inner_tensors, storage_key
from gradckpt_dist.storage.recipe import Recipes
from gradckpt_dist.storage.recompute import Passes
from gradckpt_dist.storage.recorder import AllExpensive, Recorder, Selection
from gradckpt_dist.storage.selective import Selective, SelectivePasses


class Selective8(Lossy, Selective):
    """What ``selective`` holds, and the block's inputs that need a gradient, in 8 bits a value.

    Quantised when the block's forward is over. As they are stay outputs of communication and routing, statistics, what
    is made of weights alone or without anything that trains, and what ``compress8`` would not compress either.

    Raises:
        StorageError: inside a torch.func transform; in backward with ``create_graph``.
    """

    name = "selective8"
    bits = 8

    def _passes(self, inputs: tuple[Any, ...]) -> Passes:
        return _CompressedPasses(self, inputs)


class Selective6(Selective8):
    """The same in 6 bits: a quarter less, for four times the error."""

    name = "selective6"
    bits = 6


class Selective4(Selective8):
    """The same in 4 bits, stochastically rounded; what attention makes its queries, keys and values of in 8.

    Attention's backward divides by a saved log-sum-exp that no longer matches them.
    """

    name = "selective4"
    bits = 4


class _CompressedPasses(SelectivePasses):
    """One call of a block."""

    def __init__(self, storage: Selective8, inputs: tuple[Any, ...]) -> None:
        super().__init__(storage, AllExpensive())
        self._name = storage.name
        self._roles = _Roles()
        self._call = CompressedCall(storage, self._roles)
        for tensor in inner_tensors(inputs):
            self._roles.add(tensor, Role.ACTIVATION if tensor.requires_grad else None)

    @contextmanager
    def around(self) -> Iterator[None]:
        with self._call.hooks():
            yield
            self._cache.seal(self._save)
        self._call.seal()

    @contextmanager
    def first(self) -> Iterator[None]:
        refuse = partial(refuse_double_backward, self._name)
        with self._cache.counting(asked=refuse), _RoleRecorder(self._cache, self._selection):
            yield

    def _save(self, entry: Entry, position: int, tensor: Tensor) -> Held:
        for inner in inner_tensors(tensor):
            self._roles.add(inner, entry.role if position == 0 else None)
        return save(entry, position, tensor)


class _Roles:
    """Which of the storages that are held may be compressed; one that must not be in one place must not in any."""

    def __init__(self) -> None:
        self._roles: dict[int, Role | None] = {}

    def add(self, tensor: Tensor, role: Role | None) -> None:
        key = storage_key(tensor)
        if role is None or key not in self._roles:
            self._roles[key] = role

    @property
    def early(self) -> bool:
        return False

    def role(self, tensor: Tensor, saved: Iterable[Tensor]) -> Role | None:
        return self._roles.get(storage_key(tensor))

    @property
    def recipes(self) -> Recipes | None:
        """None: cheap operations are run again in any case."""
        return None


class _RoleRecorder(Recorder):  # type: ignore[no-untyped-call]
    """Also notes what the outputs are.

    All products since the attention before are taken for what an attention's queries, keys and values are made of,
    rotations and norms in between or not.
    """

    def __init__(self, cache: OperationCache, selection: Selection) -> None:
        super().__init__(cache, selection)
        self._since_attention: list[Entry] = []

    def note(
        self, function: Any, operation: Operation, fixed: bool, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> Entry:
        entry = super().note(function, operation, fixed, args, kwargs, output)
        if operation.attends:
            for earlier in self._since_attention:
                earlier.role = Role.ATTENDED
            self._since_attention.clear()
        if operation.kind is Kind.EXPENSIVE and _is_activation(args):
            entry.role = Role.ACTIVATION
            if not operation.attends:
                self._since_attention.append(entry)
        return entry


def _is_activation(args: Any) -> bool:
    """Whether what is made of these carries a gradient and is not made of weights alone."""
    tensors = [tensor for tensor in inner_tensors(args) if tensor.is_floating_point()]
    return not all(map(is_parameter, tensors)) and any(map(_trains, tensors))


def _trains(tensor: Tensor) -> bool:
    # A view that a custom function's forward makes does not say that it needs a gradient; its base does.
    return tensor.requires_grad or (tensor._base is not None and tensor._base.requires_grad)
