"""``recompute``: keep the inputs, run the forward again in backward."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from gradckpt_dist.storage.base import Forward, Storage
from gradckpt_dist.storage.buffers import BufferGuard


class Recompute(Storage):
    """PyTorch's non-reentrant checkpoint, with the RNG preserved and early stop on."""

    name = "recompute"
    exact = True
    reruns = True

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self._buffers = BufferGuard(block)

    def run(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        # Keyword values travel as positions: checkpoint then holds tensors among them as saved tensors, finds their
        # device, and cannot mistake a block's `debug=` for its own.
        keywords = tuple(kwargs)
        buffers = self._buffers
        snapshot, versions = buffers.snapshot(), buffers.versions()
        first = True

        def call(*values: Any) -> Any:
            nonlocal first
            split = len(values) - len(keywords)
            keyword_values = dict(zip(keywords, values[split:], strict=True))
            if first:
                first = False
                result = forward(*values[:split], **keyword_values)
                buffers.settle(versions, snapshot)
                return result
            self.recomputes += 1
            with buffers.substituted(snapshot):
                return forward(*values[:split], **keyword_values)

        return checkpoint(call, *args, *kwargs.values(), use_reentrant=False, preserve_rng_state=True)
