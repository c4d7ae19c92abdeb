"""How the output of a cheap operation is made again from what its block holds anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from gradckpt_dist.errors import StorageError
from gradckpt_dist.storage.ledger import is_parameter
from gradckpt_dist.storage.quantiser import plain_torch

_ATEN = torch.ops.aten

_POINTWISE: Mapping[Any, Any] = {
    _ATEN.gelu.default: _ATEN.gelu.out,
    _ATEN.silu.default: _ATEN.silu.out,
    _ATEN.mul.Tensor: _ATEN.mul.out,
    _ATEN.div.Tensor: _ATEN.div.out,
}
"""Operations that can write over their first argument."""
_CHEAP = frozenset(
    {
        *_POINTWISE,
        _ATEN.native_layer_norm.default,
        _ATEN._fused_rms_norm.default,
        _ATEN._to_copy.default,
        _ATEN.clone.default,
    }
)
_MOST_PARAMETER_BYTES = 64 * 1024
_MOST_STEPS = 4

Key = tuple[int, int]
"""Identity of a storage and the version of what it held."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor as a view of its storage."""

    dtype: torch.dtype
    offset: int | torch.SymInt
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        return _layout(tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())

    def view(self, storage: torch.UntypedStorage) -> Tensor:
        """This part of a storage."""
        return torch.empty(0, dtype=self.dtype, device=storage.device).set_(
            storage, self.offset, self.shape, self.stride
        )


_layout = lru_cache(maxsize=1024)(Layout)  # alike for all blocks, step after step


class Source(Protocol):
    """A storage that can be had in backward."""

    def lend(self, *, overwritten: bool) -> tuple[torch.UntypedStorage, bool]:
        """The storage, and whether nobody else has it.

        One that is not going to be ``overwritten`` may be kept for whoever asks next.
        """


@dataclass(frozen=True, slots=True)
class _Operand:
    """A tensor that an operation read. The weak reference keeps its storage's identity from being used again."""

    reference: StorageWeakRef
    version: int
    layout: Layout

    @property
    def key(self) -> Key:
        return self.reference.cdata, self.version


@dataclass(frozen=True, slots=True)
class Recipe:
    """One call of a cheap operation, parameters replaced by copies, other tensors by operands."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Layout
    storage_bytes: int
    keeps: StorageWeakRef
    """Of the output, whose identity is not to be used again either."""

    def touches(self, identity: int) -> bool:
        """Whether it makes or reads this storage."""
        read = (value.reference.cdata for value in self.args if isinstance(value, _Operand))
        return identity == self.keeps.cdata or identity in read


class Recipes:
    """The recipes of one forward of a block, by what they make."""

    def __init__(self) -> None:
        self._recipes: dict[Key, Recipe] = {}

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """An operation has run, on plain tensors or others."""
        if function not in _CHEAP:
            if _write_arguments(function):
                self._forget(list(_written(function, args, kwargs)))
            return
        output = result[0] if isinstance(result, tuple) else result
        tensors = [value for value in (output, *args) if isinstance(value, Tensor)]
        if not all(map(_is_usable, tensors)) or any(isinstance(value, Tensor) for value in kwargs.values()):
            return
        args = tuple(_operand(value) if isinstance(value, Tensor) else value for value in args)
        storage = output.untyped_storage()
        reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        recipe = Recipe(function, args, dict(kwargs), Layout.of(output), storage.nbytes(), reference)
        self._recipes[reference.cdata, output._version] = recipe

    def bind(self, key: Key, find: Callable[[Key], Source | None]) -> Derivation | None:
        """What makes the storage of ``key`` from those that ``find`` knows; None where that cannot be done."""
        return self._bind(key, find, _MOST_STEPS)

    def _forget(self, written: list[Tensor]) -> None:
        """What these made or were made of is no longer so; a write through ``.data`` leaves the version as it was."""
        for tensor in written:
            identity = tensor.untyped_storage()._cdata
            self._recipes = {key: recipe for key, recipe in self._recipes.items() if not recipe.touches(identity)}

    def _bind(self, key: Key, find: Callable[[Key], Source | None], steps: int) -> Derivation | None:
        recipe = self._recipes.get(key)
        if recipe is None or not steps:
            return None
        sources: dict[Key, Source] = {}
        size_bytes = 0
        for value in recipe.args:
            if isinstance(value, Tensor):
                size_bytes += value.nbytes
            elif isinstance(value, _Operand):
                found = find(value.key) or self._bind(value.key, find, steps - 1)
                if found is None:
                    return None
                sources[value.key] = found
        size_bytes += sum(source.size_bytes for source in sources.values() if isinstance(source, Derivation))
        if not sources or size_bytes >= recipe.storage_bytes:
            return None
        return Derivation(recipe, sources, size_bytes)


class CheapOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Entered around a block's forward: notes the recipes of what is cheap in there."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recipes = Recipes()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions inside the block stay compiled."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.recipes.note(func, args, kwargs, result)
        return result


class Derivation:
    """A recipe with what it is made of."""

    __slots__ = ("_recipe", "_sources", "size_bytes")

    def __init__(self, recipe: Recipe, sources: dict[Key, Source], size_bytes: int) -> None:
        self._recipe = recipe
        self._sources = sources
        self.size_bytes = size_bytes
        """Copies of parameters."""

    def make(self) -> torch.UntypedStorage:
        """The output's storage, made anew.

        Raises:
            StorageError: the operation gave another layout than in forward.
        """
        over = self._recipe.function in _POINTWISE
        storages = {key: source.lend(overwritten=over) for key, source in self._sources.items()}
        args = [
            value.layout.view(storages[value.key][0]) if isinstance(value, _Operand) else value
            for value in self._recipe.args
        ]
        with plain_torch():
            if over and self._fits_first(storages):
                result = _POINTWISE[self._recipe.function](*args, **self._recipe.kwargs, out=args[0])
            else:
                result = self._recipe.function(*args, **self._recipe.kwargs)
        output = result[0] if isinstance(result, tuple) else result
        storage: torch.UntypedStorage = output.untyped_storage()
        if Layout.of(output) != self._recipe.output or storage.nbytes() != self._recipe.storage_bytes:
            raise StorageError(
                f"{self._recipe.function} gave {Layout.of(output)} in backward and {self._recipe.output} in forward; "
                "use keep, recompute or selective for this block"
            )
        return storage

    def lend(self, *, overwritten: bool) -> tuple[torch.UntypedStorage, bool]:
        """As ``Source`` says; nobody else ever has it."""
        return self.make(), True

    def _fits_first(self, storages: dict[Key, tuple[torch.UntypedStorage, bool]]) -> bool:
        """Whether the output can take the memory of the first argument."""
        first, *others = self._recipe.args
        if not isinstance(first, _Operand) or first.layout != self._recipe.output:
            return False
        if any(isinstance(other, _Operand) and other.key == first.key and other != first for other in others):
            return False
        storage, own = storages[first.key]
        return own and storage.nbytes() == self._recipe.storage_bytes


def _written(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The plain tensors that an operation writes to."""
    for position, name in _write_arguments(function):
        value = args[position] if position < len(args) else kwargs.get(name)
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if type(tensor) is Tensor and tensor.layout is torch.strided:
                yield tensor


@cache
def _write_arguments(function: Any) -> tuple[tuple[int, str], ...]:
    arguments = function._schema.arguments if isinstance(function, OpOverload) else ()
    written = (value.alias_info is not None and value.alias_info.is_write for value in arguments)
    return tuple((position, arguments[position].name) for position, writes in enumerate(written) if writes)


def _is_usable(tensor: Tensor) -> bool:
    if is_parameter(tensor):
        return not hasattr(tensor, "ds_id") and tensor.nbytes <= _MOST_PARAMETER_BYTES and _is_strided(tensor)
    return type(tensor) is Tensor and _is_strided(tensor)


def _is_strided(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_conj() or tensor.is_neg())


def _operand(tensor: Tensor) -> Any:
    if is_parameter(tensor):
        # The original may be freed after its module's forward, gathered again, stepped before backward.
        return tensor.detach().clone()
    reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    return _Operand(reference, tensor._version, Layout.of(tensor))
