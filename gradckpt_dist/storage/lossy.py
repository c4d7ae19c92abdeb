"""What storages that hold codes have in common."""

from __future__ import annotations

from typing import ClassVar, Self

from torch import nn

from gradckpt_dist.storage.base import Storage
from gradckpt_dist.storage.context import StorageContext
from gradckpt_dist.storage.noise import NoiseSource
from gradckpt_dist.storage.saved import Account


class Lossy(Storage):
    """Holds activations in ``bits`` a value, and counts them itself."""

    exact = False
    bits: ClassVar[int]
    account: Account

    def __init__(self, block: nn.Module, noise: NoiseSource) -> None:
        super().__init__(block)
        self.noise = noise
        self.account = Account()

    @classmethod
    def create(cls, block: nn.Module, context: StorageContext) -> Self:
        return cls(block, context.noise)

    @property
    def held_bytes(self) -> int:
        """Bytes held now for backward, compressed or not, each storage once, parameters excluded."""
        return self.account.held_bytes
