"""The checkpoint mask: one storage per block, agreed by all ranks of a domain."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from gradckpt_dist.errors import MaskError

STORAGE_NAMES = (
    "keep",
    "recompute",
    "selective",
    "selective_half",
    "compress8",
    "compress4",
    "selective8",
    "selective4",
    "offload",
    "derive",
    "compress6",
    "selective6",
)
"""Every storage; its position is its code on the wire, so entries are only ever appended."""

_CODES = {name: code for code, name in enumerate(STORAGE_NAMES)}


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Storages by block, in forward order.

    ``blocks`` and ``storages`` have the same length; ``epoch`` counts the decisions that led here.

    Raises:
        MaskError: the lengths differ, or a storage is unknown.
    """

    blocks: tuple[str, ...]
    storages: tuple[str, ...]
    epoch: int = 0

    def __post_init__(self) -> None:
        if len(self.storages) != len(self.blocks):
            raise MaskError(
                f"the mask has {len(self.storages)} storages for {len(self.blocks)} blocks; "
                f"give one for each of: {_abridged(self.blocks)}"
            )
        if not _CODES.keys() >= set(self.storages):
            storage = next(name for name in self.storages if name not in _CODES)
            block = self.blocks[self.storages.index(storage)]
            raise MaskError(f"unknown storage {storage!r} for block {block!r}; allowed: {', '.join(STORAGE_NAMES)}")

    def __len__(self) -> int:
        return len(self.storages)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of SHA-256 over block names and storages, whatever the epoch."""
        text = "\n".join(map("=".join, zip(self.blocks, self.storages, strict=True)))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def indices(self, storage: str) -> tuple[int, ...]:
        """Positions of the blocks that have this storage."""
        return tuple(i for i, name in enumerate(self.storages) if name == storage)

    def replaced(self, storages: Sequence[str]) -> Mask:
        """The next mask of the same blocks, one epoch on.

        Raises:
            MaskError: as the constructor.
        """
        return Mask(blocks=self.blocks, storages=tuple(storages), epoch=self.epoch + 1)

    def to_codes(self) -> bytes:
        """The code of each block's storage, a byte each."""
        return bytes(map(_CODES.__getitem__, self.storages))

    @classmethod
    def from_codes(cls, codes: bytes, blocks: Sequence[str], epoch: int) -> Mask:
        """The mask that ``to_codes`` wrote.

        Raises:
            MaskError: not one byte a block, or a code out of range.
        """
        if len(codes) != len(blocks):
            raise MaskError(f"a mask of {len(blocks)} blocks has {len(blocks)} codes, not {len(codes)}")
        return cls(blocks=tuple(blocks), storages=_decoded(codes), epoch=epoch)


@lru_cache(maxsize=8)
def _decoded(codes: bytes) -> tuple[str, ...]:
    """The storages of these codes; most decisions bring those of the one before."""
    if max(codes, default=0) >= len(STORAGE_NAMES):
        raise MaskError(f"storage code {max(codes)} is not in 0..{len(STORAGE_NAMES) - 1}")
    return tuple(map(STORAGE_NAMES.__getitem__, codes))


def _abridged(names: Sequence[str], limit: int = 6) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} in all)"
