"""What a rank holds of a distributed tensor. Nothing of torch.distributed is imported that is not in use already."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

_PLAIN_TYPES = (Tensor, nn.Parameter)


def is_distributed(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    return type(tensor) not in _PLAIN_TYPES and hasattr(tensor, "_local_tensor")


def is_whole_parameter(parameter: Tensor) -> bool:
    """Whether all of it is on this rank, as it is: no DTensor, and in the hands of neither ZeRO-3 nor FSDP1."""
    return type(parameter) is nn.Parameter and not (
        hasattr(parameter, "ds_id") or hasattr(parameter, "_fsdp_flattened")
    )


def part_of(tensor: Tensor) -> Tensor:
    """The tensor that is this rank's part: a DTensor's local one, or what a collective under way writes to.

    Its values may still be on their way.
    """
    if type(tensor) in _PLAIN_TYPES:
        return tensor
    part: Any = getattr(tensor, "_local_tensor", tensor)
    return part.elem if hasattr(part, "trigger_wait") else part  # type: ignore[no-any-return]


def arrived(tensor: Tensor) -> Tensor:
    """``part_of``, once its values are there."""
    if type(tensor) in _PLAIN_TYPES:
        return tensor
    part: Any = getattr(tensor, "_local_tensor", tensor)
    if hasattr(part, "trigger_wait"):
        part.trigger_wait()
    return part_of(part)


def share_of(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's part, and how many ranks of its mesh hold that same part.

    A DTensor that is a sum over ranks (``Partial``) is summed first, by a collective of its mesh.
    """
    if not is_distributed(tensor):
        return arrived(tensor), 1
    distributed: Any = tensor
    if any(placement.is_partial() for placement in distributed.placements):
        distributed = _summed(distributed)
    copies = 1
    for dimension, placement in enumerate(distributed.placements):
        if placement.is_replicate():
            copies *= distributed.device_mesh.size(dimension)
    return arrived(distributed), copies


def tokens_of(tensor: Tensor) -> Tensor | None:
    """This rank's part if it consists of whole tokens: not sharded over the last dimension, and no sum over ranks."""
    if is_distributed(tensor):
        placements: Any = tensor.placements  # type: ignore[attr-defined]
        if any(placement.is_partial() or placement.is_shard(tensor.dim() - 1) for placement in placements):
            return None
    return arrived(tensor)


class Shell:
    """All of a DTensor but its part: mesh, placements and shape."""

    __slots__ = ("_kind", "_spec")

    def __init__(self, tensor: Tensor) -> None:
        self._kind: Any = type(tensor)
        self._spec = tensor._spec  # type: ignore[attr-defined]

    def around(self, part: Tensor) -> Tensor:
        """The DTensor again."""
        return self._kind(part, self._spec, requires_grad=False)  # type: ignore[no-any-return]


def _summed(tensor: Any) -> Any:
    replicated = sys.modules["torch.distributed.tensor"].Replicate()
    placements = [replicated if placement.is_partial() else placement for placement in tensor.placements]
    return tensor.redistribute(placements=placements)
