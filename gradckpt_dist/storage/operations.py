"""What an operation that PyTorch dispatches means to a recomputation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

_EXPENSIVE = re.compile(
    r"(mm|addmm|bmm|baddbmm|addbmm|mv|addmv|linear|matmul|_linear|.*_mm|.*conv(olution|[123]d)?(_.*)?|mkldnn_rnn_layer|"
    r"_cudnn_rnn|_fft_.*|linalg_.*|_cdist_forward|.*attention.*)$"
)
_EXPENSIVE_CUSTOM = re.compile(r".*(attn|attention|gemm|matmul|grouped_mm|conv[123]d)")
_ROUTING = re.compile(
    r"(topk|sort|argsort|argmax|argmin|multinomial|nonzero|unique\w*|_unique\w*|searchsorted|bucketize)$"
)
_UNSUITABLE = re.compile(
    r"(_to_copy|clone|_conj_physical|lift\w*|empty.*|zeros.*|ones.*|full.*|new_.*|rand.*|.*batch_norm.*|_local_scalar_dense)$"
)
_FUNCTIONAL_COLLECTIVES = ("_c10d_functional", "_c10d_functional_autograd", "symm_mem")
_GATHERS = re.compile(r"all_gather_into_tensor")


class Kind(Enum):
    """How an operation is treated when its block is run again."""

    EXPENSIVE = "expensive"
    """Matrix products, convolutions, attention: worth the bytes of its output."""
    COMMUNICATION = "communication"
    """A functional collective, which every rank must issue as often as the others."""
    ROUTING = "routing"
    """Small discrete results that a rounding difference would flip."""
    CHEAP = "cheap"
    """A function of its inputs alone that may be saved if that pays."""
    WRITES = "writes"
    """Changes a tensor in place."""
    OTHER = "other"
    """Views, casts, creation, random numbers: always run."""


@dataclass(frozen=True)
class Operation:
    """One operator, as ``describe`` sees it; ``random``: it may advance a generator."""

    kind: Kind
    random: bool


@lru_cache(maxsize=None)
def describe(function: Any) -> Operation:
    """The kind of an operator, from its name and schema."""
    if not isinstance(function, OpOverload):
        return Operation(Kind.OTHER, random=False)
    random = torch.Tag.nondeterministic_seeded in function.tags
    return Operation(_kind(function, random), random)


def _kind(function: OpOverload[..., Any], random: bool) -> Kind:
    namespace, name = function.namespace, function._schema.name.split("::")[-1]
    # The schemas of c10d's in-place collectives do not say that they write.
    if namespace == "c10d" or function._schema.is_mutable:
        return Kind.WRITES
    values = (*function._schema.arguments, *function._schema.returns)
    returns_tensors = any("Tensor" in str(value.type) for value in function._schema.returns)
    if not returns_tensors or any(value.alias_info is not None for value in values):
        return Kind.OTHER
    if namespace in _FUNCTIONAL_COLLECTIVES:
        return Kind.OTHER if name.startswith(("wait", "_wrap")) else Kind.COMMUNICATION
    if namespace != "aten":
        return Kind.EXPENSIVE if _EXPENSIVE_CUSTOM.match(name) else Kind.OTHER
    if "backward" in name or _UNSUITABLE.match(name):
        return Kind.OTHER
    if _EXPENSIVE.match(name):
        return Kind.EXPENSIVE
    if _ROUTING.match(name):
        return Kind.ROUTING
    return Kind.OTHER if random else Kind.CHEAP


def gathers_parameter(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether this gathers the shards of a weight, which are to be gathered again rather than held."""
    return bool(_GATHERS.match(function._schema.name.split("::")[-1])) and any(
        isinstance(candidate, torch.nn.Parameter)
        for tensor in args
        if isinstance(tensor, torch.Tensor)
        for candidate in (tensor, tensor._base)
    )


def signature(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What must be alike for two calls to be taken as the same call, run again: shapes, dtypes and other arguments."""
    leaves = (
        (value.shape, value.dtype) if isinstance(value, torch.Tensor) else value
        for value in tree_leaves((args, kwargs))
    )
    return (function, *leaves)


def written(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation of kind ``WRITES`` may change."""
    if function.namespace == "c10d":
        return list(inner_tensors((args, kwargs)))
    arguments = function._schema.arguments
    values = [
        args[index] if index < len(args) else kwargs.get(argument.name)
        for index, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return list(inner_tensors(values))


def inner_tensors(values: Any) -> Iterator[torch.Tensor]:
    """The strided tensors among these values, wrapper subclasses (DTensor) replaced by what they hold."""
    for leaf in tree_leaves(values):
        if not isinstance(leaf, torch.Tensor):
            continue
        if type(leaf) not in (torch.Tensor, torch.nn.Parameter) and is_traceable_wrapper_subclass(leaf):
            names, _ = leaf.__tensor_flatten__()  # type: ignore[attr-defined]
            yield from inner_tensors([getattr(leaf, name) for name in names])
        elif leaf.layout is torch.strided:
            yield leaf


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage, for as long as somebody holds it."""
    return tensor.untyped_storage()._cdata


def storage_bytes(values: Any) -> int:
    """Bytes of the distinct storages behind these values."""
    sizes = {storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in inner_tensors(values)}
    return sum(sizes.values())
