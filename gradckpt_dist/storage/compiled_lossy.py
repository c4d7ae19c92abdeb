"""``selective8``, ``selective6`` and ``selective4`` for compiled blocks: codes of what a selective variant saves."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from gradckpt_dist.storage.base import Forward
from gradckpt_dist.storage.choice import UnseenOperations
from gradckpt_dist.storage.code_operators import seeds_from
from gradckpt_dist.storage.compiled import CompiledSelective, call_block, node_of
from gradckpt_dist.storage.compress import ATTENTION_BITS, CompressedCall
from gradckpt_dist.storage.deferred import refuse_double_backward, refuse_transforms
from gradckpt_dist.storage.lossy import Lossy
from gradckpt_dist.storage.noise import NoiseSource
from gradckpt_dist.storage.variant import Settings, Variant
from gradckpt_dist.storage.verdict import Verdict

MOST_ERROR = 0.002
"""So much the gradients of ``selective`` may differ from the block's, relative to these."""


class CompiledSelective8(Lossy, CompiledSelective):
    """Quantised in 8 bits a value, in the compiled graphs themselves: restored one by one, where backward reads them.

    What these leave as it is, or all where the user's backend is not inductor or sizes are dynamic, is quantised as
    ``compress8`` does it, when the forward is over.

    In half precision the gradients of ``selective`` are not the block's bit for bit, as fused kernels round less often.
    That is much less than codes change, and than other random numbers would.

    Raises:
        StorageError: the gradients of ``selective`` differ by more than 0.002; weights are in shards; inside a
            torch.func transform; in backward with ``create_graph``.
    """

    name = "selective8"
    bits = 8

    def __init__(self, block: nn.Module, noise: NoiseSource) -> None:
        super().__init__(block, noise)
        self._codes = Variant(block, call_block, Settings(budget=self.budget, partitioner=_partitioner(self.bits)))

    def accepts(self, verdict: Verdict) -> bool:
        return verdict.exact or verdict.relative_error <= MOST_ERROR

    def run(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        refuse_transforms(self.name)
        largest_bytes = self.verified(forward, args, kwargs).largest_bytes
        key = self._codes.key(args, kwargs)
        with seeds_from(self.noise):
            if key in self._codes.complete:
                return self._guarded(self._codes(*args, **kwargs))
            choice = UnseenOperations(self.block, tree_leaves((args, kwargs)))
            call = CompressedCall(self, choice, largest_bytes=largest_bytes)
            with call.hooks():
                result = self._codes(*args, **kwargs)
        if call.seal() == 0:
            self._codes.complete.add(key)
        return result

    def _guarded(self, result: Any) -> Any:
        """``result``, whose backward refuses to be differentiated itself."""
        node = node_of(result)
        if node is not None:
            node.register_prehook(lambda _: refuse_double_backward(self.name))
        return result


class CompiledSelective6(CompiledSelective8):
    """The same in 6 bits."""

    name = "selective6"
    bits = 6


class CompiledSelective4(CompiledSelective8):
    """The same in 4 bits, as ``compress4`` does it."""

    name = "selective4"
    bits = 4


@cache
def _partitioner(bits: int) -> Any:
    # Imported here: it takes a second, and not every run compiles.
    from gradckpt_dist.storage.code_partitioner import CodePartitioner  # noqa: PLC0415

    return CodePartitioner(bits, ATTENTION_BITS[bits])
