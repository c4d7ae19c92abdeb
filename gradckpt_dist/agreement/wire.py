"""What rank 0 broadcasts: a decision as plain bytes, checked before use."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from gradckpt_dist.errors import MaskError
from gradckpt_dist.mask import Mask

_HEADER = struct.Struct("<qqd")
_CHECKSUM_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A mask, the step at whose boundary its statistics were launched, and the policy's theta (NaN for none)."""

    mask: Mask
    step: int
    theta: float


def message_bytes(blocks: int) -> int:
    """Length of a decision on the wire: header, one byte a block, checksum."""
    return _HEADER.size + blocks + _CHECKSUM_BYTES


def encode(decision: Decision) -> torch.Tensor:
    """uint8 [message_bytes]; the checksum covers every byte and the names of the blocks."""
    mask = decision.mask
    body = _HEADER.pack(mask.epoch, decision.step, decision.theta) + mask.to_codes()
    return torch.frombuffer(bytearray(body + _checksum(body, mask.blocks)), dtype=torch.uint8)


def decode(message: torch.Tensor, blocks: Sequence[str]) -> Decision:
    """The decision that ``encode`` wrote.

    Raises:
        MaskError: wrong length, a storage code out of range, or a checksum that does not match.
    """
    raw = bytes(message.tolist())
    if len(raw) != message_bytes(len(blocks)):
        raise MaskError(f"a decision for {len(blocks)} blocks has {message_bytes(len(blocks))} bytes, not {len(raw)}")
    body, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
    if _checksum(body, blocks) != checksum:
        raise MaskError("the broadcast decision does not match its digest; a byte has changed on the way")
    epoch, step, theta = _HEADER.unpack_from(body)
    return Decision(mask=Mask.from_codes(body[_HEADER.size :], blocks, epoch), step=step, theta=theta)


def _checksum(body: bytes, blocks: Sequence[str]) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECKSUM_BYTES, key=_names_digest(tuple(blocks))).digest()


@lru_cache(maxsize=8)
def _names_digest(blocks: tuple[str, ...]) -> bytes:
    return hashlib.blake2b("\n".join(blocks).encode(), digest_size=_CHECKSUM_BYTES).digest()
