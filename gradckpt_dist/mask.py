"""The checkpoint mask: one storage per block, agreed by all ranks of a domain."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

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
        for block, storage in zip(self.blocks, self.storages, strict=True):
            if storage not in _CODES:
                raise MaskError(f"unknown storage {storage!r} for block {block!r}; allowed: {', '.join(STORAGE_NAMES)}")

    def __len__(self) -> int:
        return len(self.storages)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of SHA-256 over block names and storages, whatever the epoch."""
        text = "\n".join(f"{block}={storage}" for block, storage in zip(self.blocks, self.storages, strict=True))
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

    def to_tensor(self) -> torch.Tensor:
        """Codes of the storages, int8 [blocks], on the CPU."""
        return torch.tensor([_CODES[name] for name in self.storages], dtype=torch.int8)

    @classmethod
    def from_tensor(cls, codes: torch.Tensor, blocks: Sequence[str], epoch: int) -> Mask:
        """The mask that ``to_tensor`` wrote.

        Raises:
            MaskError: not int8 [blocks], or a code out of range.
        """
        if codes.dtype != torch.int8 or codes.shape != (len(blocks),):
            raise MaskError(
                f"a mask of {len(blocks)} blocks is int8 [{len(blocks)}], not {codes.dtype} {list(codes.shape)}"
            )
        values = codes.tolist()
        for value in values:
            if not 0 <= value < len(STORAGE_NAMES):
                raise MaskError(f"storage code {value} is not in 0..{len(STORAGE_NAMES) - 1}")
        return cls(blocks=tuple(blocks), storages=tuple(STORAGE_NAMES[value] for value in values), epoch=epoch)


def _abridged(names: Sequence[str], limit: int = 6) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} in all)"
