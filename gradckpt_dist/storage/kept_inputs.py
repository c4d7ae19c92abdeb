"""Where the inputs of a recomputed block wait for its backward, if not where they are."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import ProcessGroup

from gradckpt_dist.storage.lane import OffloadLane
from gradckpt_dist.storage.offload import HostCopy
from gradckpt_dist.storage.saved import Account, Kept, VersionCheck, is_movable, is_plain


class KeptInputs:
    """Keeps a share of each input on every rank of ``group``, or inputs and shares in host memory by ``lane``; or both.

    The ranks of ``group`` hold equal inputs and run the same blocks in the same order: each input is gathered again in
    backward, in a collective. Only what needs a gradient is moved: a mask or a table that all blocks are given stays
    one tensor. So do small tensors, those that are not contiguous, and those that do not divide by the ranks.
    """

    def __init__(self, group: ProcessGroup | None = None, lane: OffloadLane | None = None) -> None:
        self._group = group
        self._ranks = 1 if group is None else dist.get_world_size(group)
        self._rank = 0 if group is None else dist.get_rank(group)
        self._lane = lane

    def around(self, account: Account) -> saved_tensors_hooks:
        """Entered around a call of ``torch.utils.checkpoint``, whose inputs are packed; ``account`` counts them."""
        return saved_tensors_hooks(partial(self._pack, account), _unpack)

    def _pack(self, account: Account, tensor: torch.Tensor) -> _Packed:
        needs_gradient = tensor.requires_grad
        whole = tensor.detach() if is_plain(tensor) else tensor
        movable = needs_gradient and is_plain(tensor) and tensor.is_contiguous() and is_movable(tensor)
        if not (movable and tensor.is_floating_point()):
            return _Whole(whole, account)
        shared = self._ranks > 1 and tensor.numel() % self._ranks == 0
        flat = whole.view(-1)
        part = flat.chunk(self._ranks)[self._rank].clone() if shared else flat
        moved = self._moved(part, account)
        if moved is None and not shared:
            return _Whole(whole, account)
        share = _Share(part if moved is None else moved, part, account)
        return _Moved(share, whole.shape, self._group if shared else None, self._ranks)

    def _moved(self, part: torch.Tensor, account: Account) -> HostCopy | None:
        if self._lane is None:
            return None
        buffer = self._lane.take(part.nbytes, part.device)
        return None if buffer is None else HostCopy(part.view(torch.uint8), buffer, self._lane, account)


class _Packed(Protocol):
    def tensor(self) -> torch.Tensor: ...


class _Whole:
    """A tensor that has stayed as it was."""

    def __init__(self, tensor: torch.Tensor, account: Account) -> None:
        self._tensor = tensor
        self._check = VersionCheck(tensor, tensor)
        self._kept = Kept(tensor.untyped_storage().nbytes(), account) if is_plain(tensor) else None

    def tensor(self) -> torch.Tensor:
        self._check.verify()
        return self._tensor


class _Share:
    """This rank's part, flat, on the device or on the host."""

    def __init__(self, place: torch.Tensor | HostCopy, part: torch.Tensor, account: Account) -> None:
        self._place = place
        self._dtype, self._device = part.dtype, part.device
        self._kept = Kept(part.nbytes, account) if isinstance(place, torch.Tensor) else None

    def tensor(self) -> torch.Tensor:
        if isinstance(self._place, torch.Tensor):
            return self._place
        flat = torch.empty(0, dtype=self._dtype, device=self._device)
        storage = self._place.arrive()
        return flat.set_(storage, 0, (storage.nbytes() // flat.element_size(),), (1,))


class _Moved:
    """A tensor of which this rank holds a share; all of it, without a group."""

    def __init__(self, share: _Share, shape: torch.Size, group: ProcessGroup | None, ranks: int) -> None:
        self._share, self._shape, self._group, self._ranks = share, shape, group, ranks

    def tensor(self) -> torch.Tensor:
        part = self._share.tensor()
        if self._group is None:
            return part.view(self._shape)
        whole = part.new_empty(part.numel() * self._ranks)
        dist.all_gather_single(whole, part, group=self._group)
        return whole.view(self._shape)


def _unpack(packed: Any) -> torch.Tensor:
    tensor: torch.Tensor = packed.tensor()
    return tensor
