"""What the tensors inside a block's forward are, told from the operations that made them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum, auto
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from gradckpt_dist.storage.ledger import is_parameter
from gradckpt_dist.storage.parts import part_of
from gradckpt_dist.storage.recipe import CheapOperations


class Role(Enum):
    """What a tensor's storage holds."""

    ACTIVATION = auto()
    """Depends on what the block was given to differentiate, or on a weight and something else."""
    ATTENDED = auto()
    """An activation that is query, key or value of an attention operation."""
    WEIGHT = auto()
    """A parameter or buffer, or made of nothing else: cast or transposed."""
    OTHER = auto()
    """Masks, indices, tables, statistics."""


class Lineage(CheapOperations):  # type: ignore[no-untyped-call]
    """Entered around a block's forward; afterwards says what the storages made or given there are.

    A storage that no operation in there has made is unknown, and so no activation: a weight that the cache of autocast
    has kept from another block, a table that is an attribute of a module.
    """

    def __init__(self, modules: Iterable[nn.Module], inputs: Iterable[Any]) -> None:
        """``modules``: the block and all inside it."""
        super().__init__()
        self._roles: dict[int, Role] = {}
        for leaf in inputs:
            if (key := _key(leaf)) is not None:
                self._roles[key] = Role.ACTIVATION if leaf.requires_grad else Role.OTHER
        for module in modules:
            for weight in (*module._parameters.values(), *module._buffers.values()):
                if (key := _key(weight)) is not None:
                    self._roles[key] = Role.WEIGHT

    def role(self, tensor: Tensor) -> Role | None:
        """Of the storage of ``tensor``; None where it is unknown."""
        key = _key(tensor)
        return None if key is None else self._roles.get(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        looks, attends = _traits(func)
        if looks:
            return result
        self.recipes.note(func, args, kwargs, result)
        inputs = list(_operands((*args, *kwargs.values()) if kwargs else args))
        outputs = (result,) if isinstance(result, Tensor) else result
        if isinstance(outputs, (tuple, list)):
            self._note(inputs, outputs)
        if attends:
            for key, _ in inputs[:3]:
                if self._roles.get(key) is Role.ACTIVATION:
                    self._roles[key] = Role.ATTENDED
        return result

    def _note(self, inputs: list[tuple[int, Tensor]], outputs: Iterable[Any]) -> None:
        existing = [key for key, _ in inputs]
        role = self._derived(inputs)
        for position, tensor in enumerate(outputs):
            key = _key(tensor)
            if key is None:
                continue
            if key not in existing:
                # What comes second is a statistic, a mask or a random state.
                self._roles[key] = role if position == 0 else Role.OTHER
            elif role is Role.ACTIVATION and self._roles.get(key) is Role.OTHER:
                self._roles[key] = role  # written to

    def _derived(self, inputs: list[tuple[int, Tensor]]) -> Role:
        """The role of what is made of these."""
        roles = []
        trains = False
        for key, tensor in inputs:
            if not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            role = self._roles.get(key) or _input_role(tensor)
            if role is Role.ACTIVATION or role is Role.ATTENDED:
                return Role.ACTIVATION
            roles.append(role)
            trains |= tensor.requires_grad
        if Role.WEIGHT not in roles:
            return Role.OTHER
        if Role.OTHER not in roles:
            return Role.WEIGHT
        return Role.ACTIVATION if trains else Role.OTHER


def _input_role(tensor: Tensor) -> Role:
    """Of a storage that nothing here has made."""
    if is_parameter(tensor):
        return Role.WEIGHT
    return Role.ACTIVATION if tensor.requires_grad and not tensor.is_leaf else Role.OTHER


def _operands(values: Iterable[Any]) -> Iterator[tuple[int, Tensor]]:
    """Keys and tensors among an operation's arguments, lists of tensors included."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _operands(value)
        elif (key := _key(value)) is not None:
            yield key, value


@cache
def _traits(func: Any) -> tuple[bool, bool]:
    """Whether it only looks at what its arguments hold, so that no storage is made or written to; and is attention."""
    returns = func._schema.returns if isinstance(func, OpOverload) else ()
    aliases = [value.alias_info is not None and not value.alias_info.is_write for value in returns]
    return bool(aliases) and all(aliases), "attention" in str(func)


def _key(value: Any) -> int | None:
    """Identity of the storage of a strided tensor, or of this rank's part of it; None of anything else."""
    if not isinstance(value, Tensor):
        return None
    part = part_of(value)
    kind = type(part)
    if (kind is Tensor or kind is nn.Parameter) and part.layout is torch.strided:
        return int(part.untyped_storage()._cdata)
    return None
