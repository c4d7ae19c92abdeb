"""Which of the tensors that a block has saved may be compressed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradckpt_dist.storage.ledger import is_parameter
from gradckpt_dist.storage.lineage import Lineage, Role
from gradckpt_dist.storage.recipe import Recipes
from gradckpt_dist.storage.saved import buffer_storages, is_plain

_ATTENTION_DIMENSIONS = 4
_MATRIX_DIMENSIONS = 2


class Choice(Protocol):
    """Made anew for each forward, and asked when it is over."""

    @property
    def early(self) -> bool:
        """Whether it may be asked before, too, about what nothing in the forward has any more."""

    def role(self, tensor: Tensor, saved: Iterable[Tensor]) -> Role | None:
        """ACTIVATION or ATTENDED, one of the tensors that were ``saved``; None for what has to stay as it is."""

    @property
    def recipes(self) -> Recipes | None:
        """How what was saved can be made again from what else was; None where that was not seen."""


class SeenOperations:
    """For a block whose operations were seen: activations are what ``Lineage`` knows as such."""

    def __init__(self, lineage: Lineage) -> None:
        self._lineage = lineage

    @property
    def early(self) -> bool:
        return True

    def role(self, tensor: Tensor, saved: Iterable[Tensor]) -> Role | None:
        role = self._lineage.role(tensor)
        return role if role is Role.ACTIVATION or role is Role.ATTENDED else None

    @property
    def recipes(self) -> Recipes | None:
        return self._lineage.recipes


class UnseenOperations:
    """For a compiled block: everything but buffers, inputs that need no gradient, and what was made of weights.

    That is told by a weight's shape in another dtype, or with more than two dimensions, where hardly an activation has
    it: what is saved of a convolution's weight has another layout.

    Where something [batch, heads, tokens] was saved, what is [batch, ..., width] beside it belongs to an attention.
    """

    def __init__(self, block: nn.Module, inputs: Iterable[Any]) -> None:
        self._excluded = buffer_storages(block) | {
            leaf.untyped_storage()._cdata
            for leaf in inputs
            if isinstance(leaf, Tensor) and is_plain(leaf) and not leaf.requires_grad
        }
        self._weights = {
            (shape, parameter.dtype)
            for parameter in block.parameters()
            for shape in (tuple(parameter.shape), tuple(reversed(parameter.shape)))
        }

    @property
    def early(self) -> bool:
        return False

    def role(self, tensor: Tensor, saved: Iterable[Tensor]) -> Role | None:
        if tensor.untyped_storage()._cdata in self._excluded or is_parameter(tensor) or self._is_weight(tensor):
            return None
        return Role.ATTENDED if self._is_attended(tensor, saved) else Role.ACTIVATION

    @property
    def recipes(self) -> Recipes | None:
        return None

    def _is_weight(self, tensor: Tensor) -> bool:
        dtypes = {dtype for shape, dtype in self._weights if shape == tuple(tensor.shape)}
        return bool(dtypes) and (tensor.dim() > _MATRIX_DIMENSIONS or tensor.dtype not in dtypes)

    def _is_attended(self, tensor: Tensor, saved: Iterable[Tensor]) -> bool:
        return tensor.dim() == _ATTENTION_DIMENSIONS and any(
            other.dim() == _ATTENTION_DIMENSIONS - 1
            and other.dtype == torch.float32
            and other.shape[0] == tensor.shape[0]
            and other.shape[2] == tensor.shape[2]
            for other in saved
        )
