"""``selective8``, ``selective6`` and ``selective4`` for compiled blocks: codes of what a selective variant saves."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from torch import nn
from torch.utils._pytree import tree_leaves

from gradckpt_dist.storage.base import Forward
from gradckpt_dist.storage.choice import UnseenOperations
from gradckpt_dist.storage.compiled import CompiledSelective
from gradckpt_dist.storage.compress import CompressedCall
from gradckpt_dist.storage.context import StorageContext
from gradckpt_dist.storage.noise import NoiseSource
from gradckpt_dist.storage.saved import Account


class CompiledSelective8(CompiledSelective):
    """Quantised in 8 bits a value, as ``compress8`` does it, when the variant's forward is over.

    Raises:
        StorageError: the variant's gradients are not the block's; inside a torch.func transform; in backward with
            ``create_graph``.
    """

    name = "selective8"
    exact = False
    bits: ClassVar[int] = 8

    def __init__(self, block: nn.Module, noise: NoiseSource) -> None:
        super().__init__(block)
        self._noise = noise
        self._account = Account()

    @classmethod
    def create(cls, block: nn.Module, context: StorageContext) -> Self:
        return cls(block, context.noise)

    @property
    def held_bytes(self) -> int:
        """Bytes held now for backward, compressed or not, each storage once, parameters excluded."""
        return self._account.held_bytes

    def run(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        call = CompressedCall(self.name, self._account)
        self.ensure_verified(forward, args, kwargs)
        with call.hooks():
            result = super().run(forward, *args, **kwargs)
        call.seal(UnseenOperations(self.block, tree_leaves((args, kwargs))), self.bits, self._noise)
        return result


class CompiledSelective6(CompiledSelective8):
    """The same in 6 bits."""

    name = "selective6"
    bits = 6


class CompiledSelective4(CompiledSelective8):
    """The same in 4 bits, as ``compress4`` does it."""

    name = "selective4"
    bits = 4
