"""What storages that hold codes have in common."""

from __future__ import annotations

from typing import ClassVar, Self

from torch import nn

from gradckpt_dist.storage.base import Storage
from gradckpt_dist.storage.context import StorageContext
from gradckpt_dist.storage.noise import NoiseSource


class Lossy(Storage):
    """Holds activations in ``bits`` a value."""

    exact = False
    bits: ClassVar[int]

    def __init__(self, block: nn.Module, noise: NoiseSource) -> None:
        super().__init__(block)
        self.noise = noise

    @classmethod
    def create(cls, block: nn.Module, context: StorageContext) -> Self:
        return cls(block, context.noise)
