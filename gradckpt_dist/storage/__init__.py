"""Storages by name."""

from __future__ import annotations

from torch import nn

from gradckpt_dist.errors import StorageError
from gradckpt_dist.storage.base import Forward, Storage
from gradckpt_dist.storage.keep import Keep
from gradckpt_dist.storage.recompute import Recompute

STORAGES: dict[str, type[Storage]] = {storage.name: storage for storage in (Keep, Recompute)}


def create_storage(name: str, block: nn.Module) -> Storage:
    """The storage of that name for one block.

    Raises:
        StorageError: this version has no such storage.
    """
    if name not in STORAGES:
        raise StorageError(f"storage {name!r} is not available; this version has: {', '.join(STORAGES)}")
    return STORAGES[name](block)


__all__ = ["STORAGES", "Forward", "Storage", "create_storage"]
