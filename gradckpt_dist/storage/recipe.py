"""How the output of a cheap operation is made again from what its block holds anyway."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map_only

from gradckpt_dist.errors import StorageError
from gradckpt_dist.storage.ledger import is_parameter

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
        return cls(tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())

    def view(self, storage: torch.UntypedStorage) -> Tensor:
        """This part of a storage."""
        return torch.empty(0, dtype=self.dtype, device=storage.device).set_(
            storage, self.offset, self.shape, self.stride
        )


class Source(Protocol):
    """A storage that can be had in backward."""

    @property
    def device(self) -> torch.device: ...

    def fresh(self) -> tuple[torch.UntypedStorage, bool]:
        """The storage, and whether nobody else has it, so that it may be written to."""


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
    """One call of a cheap operation, tensors but parameters replaced by operands."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Layout
    storage_bytes: int
    keeps: StorageWeakRef
    """Of the output, whose identity is not to be used again either."""


class Recipes:
    """The recipes of one forward of a block, by what they make."""

    def __init__(self) -> None:
        self._recipes: dict[Key, Recipe] = {}

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """An operation has run, on plain tensors or others."""
        if function not in _CHEAP:
            return
        output = result[0] if isinstance(result, tuple) else result
        if not all(_is_usable(leaf) for leaf in (output, *tree_leaves((args, kwargs))) if isinstance(leaf, Tensor)):
            return
        args, kwargs = tree_map_only(Tensor, _operand, (args, kwargs))
        storage = output.untyped_storage()
        reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        recipe = Recipe(function, args, kwargs, Layout.of(output), storage.nbytes(), reference)
        self._recipes[reference.cdata, output._version] = recipe

    def bind(self, key: Key, find: Callable[[Key], Source | None]) -> Derivation | None:
        """What makes the storage of ``key`` from those that ``find`` knows; None where that cannot be done."""
        return self._bind(key, find, _MOST_STEPS)

    def _bind(self, key: Key, find: Callable[[Key], Source | None], steps: int) -> Derivation | None:
        recipe = self._recipes.get(key)
        if recipe is None or not steps:
            return None
        sources: dict[Key, Source] = {}
        size_bytes = 0
        for leaf in tree_leaves((recipe.args, recipe.kwargs)):
            if isinstance(leaf, _Operand):
                found = find(leaf.key) or self._bind(leaf.key, find, steps - 1)
                if found is None:
                    return None
                sources[leaf.key] = found
            elif isinstance(leaf, Tensor):
                size_bytes += leaf.nbytes
        if not sources:
            return None
        size_bytes += sum(source.size_bytes for source in sources.values() if isinstance(source, Derivation))
        # Parameters may be freed, gathered again or stepped before backward, so that theirs is a copy.
        args, kwargs = tree_map_only(Tensor, lambda weight: weight.detach().clone(), (recipe.args, recipe.kwargs))
        return Derivation(recipe, args, kwargs, sources, size_bytes)


class Derivation:
    """A recipe with what it is made of."""

    __slots__ = ("_args", "_kwargs", "_recipe", "_sources", "size_bytes")

    def __init__(
        self, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any], sources: dict[Key, Source], size_bytes: int
    ) -> None:
        self._recipe = recipe
        self._args = args
        self._kwargs = kwargs
        self._sources = sources
        self.size_bytes = size_bytes
        """Copies of parameters."""

    @property
    def device(self) -> torch.device:
        return next(iter(self._sources.values())).device

    def fresh(self) -> tuple[torch.UntypedStorage, bool]:
        """The output's storage, made anew.

        Raises:
            StorageError: the operation gave another layout than in forward.
        """
        storages = {key: source.fresh() for key, source in self._sources.items()}
        args, kwargs = tree_map_only(
            _Operand, lambda operand: operand.layout.view(storages[operand.key][0]), (self._args, self._kwargs)
        )
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            result = self._run(args, kwargs, storages)
        output = result[0] if isinstance(result, tuple) else result
        storage: torch.UntypedStorage = output.untyped_storage()
        if Layout.of(output) != self._recipe.output or storage.nbytes() != self._recipe.storage_bytes:
            raise StorageError(
                f"{self._recipe.function} gave {Layout.of(output)} in backward and {self._recipe.output} in forward; "
                "use keep, recompute or selective for this block"
            )
        return storage, True

    def _run(self, args: Any, kwargs: Any, storages: dict[Key, tuple[torch.UntypedStorage, bool]]) -> Any:
        """Over the first argument where that is what the output looks like and nobody else has it."""
        recipe = self._recipe
        first = recipe.args[0]
        if (
            recipe.function in _POINTWISE
            and isinstance(first, _Operand)
            and storages[first.key][1]
            and first.layout == recipe.output
            and storages[first.key][0].nbytes() == recipe.storage_bytes
        ):
            return _POINTWISE[recipe.function](*args, **kwargs, out=args[0])
        return recipe.function(*args, **kwargs)


def _is_usable(tensor: Tensor) -> bool:
    if is_parameter(tensor):
        return not hasattr(tensor, "ds_id") and tensor.nbytes <= _MOST_PARAMETER_BYTES and _is_strided(tensor)
    return type(tensor) is Tensor and _is_strided(tensor)


def _is_strided(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_conj() or tensor.is_neg())


def _operand(tensor: Tensor) -> Any:
    if is_parameter(tensor):
        return tensor
    reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    return _Operand(reference, tensor._version, Layout.of(tensor))
