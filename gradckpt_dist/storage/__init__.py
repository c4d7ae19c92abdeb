"""Storages by name."""

from __future__ import annotations

from torch import nn

from gradckpt_dist.errors import StorageError
from gradckpt_dist.storage.base import Forward, Storage
from gradckpt_dist.storage.compiled import CompiledRecompute, CompiledSelective, CompiledSelectiveHalf
from gradckpt_dist.storage.compiled_lossy import CompiledSelective4, CompiledSelective6, CompiledSelective8
from gradckpt_dist.storage.compress import Compress4, Compress6, Compress8
from gradckpt_dist.storage.context import StorageContext
from gradckpt_dist.storage.derive import Derive
from gradckpt_dist.storage.keep import Keep
from gradckpt_dist.storage.offload import Offload
from gradckpt_dist.storage.recompute import Recompute
from gradckpt_dist.storage.selective import Selective, SelectiveHalf
from gradckpt_dist.storage.selective_lossy import Selective4, Selective6, Selective8
from gradckpt_dist.storage.variant import is_compiled

STORAGES: dict[str, type[Storage]] = {
    storage.name: storage
    for storage in (
        Keep,
        Recompute,
        Selective,
        SelectiveHalf,
        Derive,
        Compress8,
        Compress6,
        Compress4,
        Selective8,
        Selective6,
        Selective4,
        Offload,
    )
}

COMPILED_STORAGES: dict[str, type[Storage]] = {
    storage.name: storage
    for storage in (
        CompiledRecompute,
        CompiledSelective,
        CompiledSelectiveHalf,
        CompiledSelective8,
        CompiledSelective6,
        CompiledSelective4,
    )
}
"""What takes a storage's place where the user has compiled the block."""


def create_storage(name: str, block: nn.Module, context: StorageContext | None = None) -> Storage:
    """The storage of that name for one block; ``context`` is what it shares with those of the same engine's blocks.

    Raises:
        StorageError: this version has no such storage.
    """
    if name not in STORAGES:
        raise StorageError(f"storage {name!r} is not available; this version has: {', '.join(STORAGES)}")
    compiled = COMPILED_STORAGES.get(name) if is_compiled(block) else None
    context = context or StorageContext()
    storage = (compiled or STORAGES[name]).create(block, context)
    storage.account.slack = context.slack
    return storage


__all__ = ["STORAGES", "Forward", "Storage", "StorageContext", "create_storage"]
