"""``selective8``, ``selective6`` and ``selective4`` for compiled blocks: codes of what a selective variant saves."""

from __future__ import annotations

from typing import Any

from torch.utils._pytree import tree_leaves

from gradckpt_dist.storage.base import Forward
from gradckpt_dist.storage.choice import UnseenOperations
from gradckpt_dist.storage.compiled import CompiledSelective
from gradckpt_dist.storage.compress import CompressedCall
from gradckpt_dist.storage.deferred import refuse_transforms
from gradckpt_dist.storage.lossy import Lossy


class CompiledSelective8(Lossy, CompiledSelective):
    """Quantised in 8 bits a value, as ``compress8`` does it, when the variant's forward is over.

    Raises:
        StorageError: the variant's gradients are not the block's; inside a torch.func transform; in backward with
            ``create_graph``.
    """

    name = "selective8"
    bits = 8

    def run(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        refuse_transforms(self.name)
        call = CompressedCall(self, UnseenOperations(self.block, tree_leaves((args, kwargs))))
        self.ensure_verified(forward, args, kwargs)
        with call.hooks():
            result = self.call_variant(*args, **kwargs)
        call.seal()
        return result


class CompiledSelective6(CompiledSelective8):
    """The same in 6 bits."""

    name = "selective6"
    bits = 6


class CompiledSelective4(CompiledSelective8):
    """The same in 4 bits, as ``compress4`` does it."""

    name = "selective4"
    bits = 4
