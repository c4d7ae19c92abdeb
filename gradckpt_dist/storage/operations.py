"""What an operation that PyTorch dispatches means to a recomputation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch import nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

_EXPENSIVE = re.compile(
    r"mm|mv|bmm|addmv|addr|dot|vdot|addbmm|baddbmm|_?addmm\w*|\w*_mm|matmul|\w*linear|\w*conv(olution|[123]d|_depthwise)\w*"
    r"|\w*attention\w*|\w*_rnn(_layer)?|_fft_\w+|linalg_\w+|_cdist_forward"
)
_EXPENSIVE_ELSEWHERE = re.compile(r"\w*(attn|attention|gemm|matmul|grouped_mm|conv[123]d)\w*")
_ROUTING = re.compile(
    r"topk|kthvalue|sort|argsort|argmax|argmin|multinomial|nonzero|_?unique\w*|searchsorted|bucketize|bincount"
)
_NOT_WORTH_HOLDING = re.compile(
    r"_to_copy|clone|alias\w*|detach\w*|_unsafe_view|_reshape\w*|_conj_physical|lift\w*|empty\w*|zeros\w*|ones\w*|full\w*"
    r"|new_\w+|rand\w*|scalar_tensor|arange\w*|_local_scalar_dense|\w*batch_norm\w*|_efficientzerotensor"
)
_FUNCTIONAL_COLLECTIVES = ("_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "symm_mem")
_NOT_HELD_COLLECTIVES = re.compile(r"wait_tensor|_wrap_tensor\w*")
_PLAIN = (int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)

Occurrence = tuple[Any, int]
"""An operator, and how many considered calls of it came before in the same forward."""


class Kind(Enum):
    """How an operation is treated when its block is run again."""

    EXPENSIVE = "expensive"
    """Matrix products, convolutions, attention: worth the bytes of its output."""
    COMMUNICATION = "communication"
    """A functional collective."""
    ROUTING = "routing"
    """Small discrete results that a rounding difference would flip."""
    CHEAP = "cheap"
    """A function of its inputs alone, to be held where that is measured to pay."""
    WRITES = "writes"
    """Changes a tensor in place."""
    OTHER = "other"
    """Views, casts, creation, random numbers: always run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One operator, as ``describe`` sees it.

    ``local``: it certainly does nothing but compute on this rank. ``gathers``: its result holds more than what it was
    made of. ``attends``: it is attention. ``writes``: positions and names of the arguments that it may change; None for
    all of them. ``random``: it may advance a generator; ``dropout``: position of the argument that is 0 where it does
    not.
    """

    kind: Kind
    local: bool = False
    gathers: bool = False
    attends: bool = False
    writes: tuple[tuple[int, str], ...] | None = ()
    random: bool = False
    dropout: int | None = None

    def draws(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this call may advance a generator."""
        if not self.random or self.dropout is None:
            return self.random
        probability = args[self.dropout] if self.dropout < len(args) else kwargs.get("dropout_p", 0.0)
        return bool(probability)


@cache
def describe(function: Any) -> Operation:
    """The kind of an operator, from its name and schema."""
    if isinstance(function, HigherOrderOperator):
        attends = function._name == "flex_attention"
        return Operation(kind=Kind.EXPENSIVE if attends else Kind.OTHER, attends=attends)
    if not isinstance(function, OpOverload):
        return Operation(kind=Kind.OTHER)
    schema = function._schema
    if function.namespace == "c10d":
        # The schemas of these in-place collectives do not say that they write.
        return Operation(kind=Kind.WRITES, writes=None)
    if schema.is_mutable:
        writes = tuple(
            (position, argument.name)
            for position, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        )
        return Operation(kind=Kind.WRITES, writes=writes)
    names = [argument.name for argument in schema.arguments]
    random = torch.Tag.nondeterministic_seeded in function.tags
    return Operation(
        kind=_kind(function, random),
        local=function.namespace == "aten",
        gathers=function.namespace in _FUNCTIONAL_COLLECTIVES and "all_gather" in schema.name,
        attends=re.search("attn|attention", schema.name) is not None,
        random=random,
        dropout=names.index("dropout_p") if "dropout_p" in names else None,
    )


def _kind(function: OpOverload[..., Any], random: bool) -> Kind:
    schema = function._schema
    namespace, name = function.namespace, schema.name.split("::")[-1]
    returns_tensors = any("Tensor" in str(value.type) for value in schema.returns)
    if not returns_tensors or any(value.alias_info is not None for value in (*schema.arguments, *schema.returns)):
        return Kind.OTHER
    if namespace in _FUNCTIONAL_COLLECTIVES:
        return Kind.OTHER if _NOT_HELD_COLLECTIVES.fullmatch(name) else Kind.COMMUNICATION
    if namespace != "aten":
        return Kind.EXPENSIVE if _EXPENSIVE_ELSEWHERE.fullmatch(name) else Kind.OTHER
    if _ROUTING.fullmatch(name) or (name in {"max", "min"} and function._overloadname == "dim"):
        return Kind.ROUTING
    if random or "backward" in name or _NOT_WORTH_HOLDING.fullmatch(name):
        return Kind.EXPENSIVE if random and _EXPENSIVE.fullmatch(name) else Kind.OTHER
    return Kind.EXPENSIVE if _EXPENSIVE.fullmatch(name) else Kind.CHEAP


def signature(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What must be alike for two calls to be taken as the same call, run again; hashable.

    The operator, the shapes, dtypes and placements of tensors, which parameter a tensor is or is a view of, other
    arguments.
    """
    positional = [_key(value) for value in args]
    if not kwargs:
        return (function, *positional)
    return (function, *positional, *((name, _key(value)) for name, value in kwargs.items()))


def _key(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        owner = value if isinstance(value, nn.Parameter) else value._base
        if isinstance(owner, nn.Parameter):
            return value.shape, value.dtype, id(owner), value.storage_offset()
        return value.shape, value.dtype, getattr(value, "placements", None)
    if isinstance(value, list | tuple):
        return tuple(_key(item) for item in value)
    return value if isinstance(value, _PLAIN) else type(value)


def differentiable(args: tuple[Any, ...]) -> bool:
    """Whether autograd has a part in this call.

    What frameworks do to weights in between, masks and tables that a block makes once have not; and custom functions
    run their forward without gradients.
    """
    return torch.is_grad_enabled() and any(
        value.requires_grad
        if isinstance(value, torch.Tensor)
        else isinstance(value, list | tuple) and any(isinstance(t, torch.Tensor) and t.requires_grad for t in value)
        for value in args
    )


def written(operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that a call of an operation of kind ``WRITES`` may change."""
    if operation.writes is None:
        return list(inner_tensors((args, kwargs)))
    tensors: list[torch.Tensor] = []
    for index, name in operation.writes:
        value = args[index] if index < len(args) else kwargs.get(name)
        if type(value) is torch.Tensor and value.layout is torch.strided:
            tensors.append(value)
        else:
            tensors.extend(inner_tensors(value))
    return tensors


def inner_tensors(values: Any) -> Iterator[torch.Tensor]:
    """The strided tensors among these values, wrapper subclasses (DTensor) replaced by what they hold."""
    for leaf in tree_leaves(values):
        if not isinstance(leaf, torch.Tensor):
            continue
        if type(leaf) not in (torch.Tensor, nn.Parameter) and is_traceable_wrapper_subclass(leaf):
            names, _ = leaf.__tensor_flatten__()
            yield from inner_tensors([getattr(leaf, name) for name in names])
        elif leaf.layout is torch.strided:
            yield leaf


def device_of(tensors: Sequence[torch.Tensor]) -> torch.device:
    """That of the first of floats; the CPU if there is none."""
    return next((tensor.device for tensor in tensors if tensor.is_floating_point()), torch.device("cpu"))


def autocast_of(tensors: Sequence[torch.Tensor]) -> tuple[bool, torch.dtype]:
    """Whether autocast is on where these are, and to what it casts."""
    device = device_of(tensors).type
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage, for as long as somebody holds it."""
    key: int = tensor.untyped_storage()._cdata
    return key
