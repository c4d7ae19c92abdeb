"""Exact storages of blocks that the user compiled: variants of the block, compiled to hold less.

Around a compiled block, selective checkpointing sees one opaque operation and does nothing, and a recomputation runs
all of its forward again. torch.compile has a partitioner of its own, which decides what the compiled forward saves and
what the compiled backward computes again.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from gradckpt_dist.errors import StorageError
from gradckpt_dist.storage.base import Forward, Storage
from gradckpt_dist.storage.context import StorageContext
from gradckpt_dist.storage.recompute import Recompute
from gradckpt_dist.storage.variant import Settings, Variant
from gradckpt_dist.storage.verdict import Verdict

logger = logging.getLogger(__name__)

_MOST_VERDICTS = 8
_RANDOM_STATE_BYTES = 8 * 1024


class CompiledSelective(Storage):
    """Calls a variant of the block, compiled under ``budget`` (a fraction: 0 holds the inputs, 1 what it likes).

    torch 2.13's partitioner recomputes some random operations with other random numbers (pytorch#190758), and what it
    computes again in half precision is rounded less often, so that the first call with each shape compares gradients,
    bit for bit, with those of the block as the user compiled it.
    """

    name = "selective"
    exact = True
    reruns = True
    budget: ClassVar[float] = 0.7

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self._variant = Variant(block, call_block, Settings(budget=self.budget))

    def run(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        self.verified(forward, args, kwargs)
        return self._variant(*args, **kwargs)

    def accepts(self, verdict: Verdict) -> bool:
        """Whether a variant of which this was found may be called."""
        return verdict.exact

    def verified(self, forward: Forward, args: Any, kwargs: Any) -> Verdict:
        """The verdict on the variant, to be asked for before each call.

        Raises:
            StorageError: a gradient of the variant differs from one of the user's own compilation; weights are in
                shards, which a comparison would gather on the ranks alone that have met a new shape.
        """
        if not self._variant.is_whole:
            raise StorageError(
                f"{self.name!r} is refused for the compiled {type(self.block).__name__}, whose weights are sharded "
                "(FSDP, ZeRO-3, tensor parallelism): it has to be compared with the block for each shape of inputs, "
                "and ranks may not meet the same shapes; use keep, recompute, compress or offload there"
            )
        verdict = self._variant.compare(forward, args, kwargs)
        if not self.accepts(verdict):
            raise StorageError(
                f"{self.name!r} is refused for the compiled {type(self.block).__name__}: what torch.compile computes "
                "again under an activation memory budget has other random numbers (pytorch#190758) or, in half "
                f"precision, other roundings, which makes other gradients (by {verdict.relative_error:.2g} of "
                "them); use keep, recompute, compress or offload there, or set its dropout to 0"
            )
        return verdict


class CompiledSelectiveHalf(CompiledSelective):
    """The same with about half of ``keep``'s bytes."""

    name = "selective_half"
    budget = 0.45


class CompiledRecompute(Recompute):
    """Holds the inputs alone; the compiled backward computes again only what it needs.

    In a variant of the block, torch.compile traces the checkpoint, too. The compiled block is run again as a whole, as
    an eager one is, where this variant would change a bit of a gradient, hold more than the inputs or not compile,
    where weights are sharded or inputs kept elsewhere, and for inputs of ever new shapes. ``recomputes`` counts both.
    """

    def __init__(self, block: nn.Module, context: StorageContext) -> None:
        super().__init__(block, context)
        self._shared = context
        self._variant = Variant(block, _checkpoint_block)
        self._possible = self._variant.is_whole and any(True for _ in block.parameters())

    def run(self, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
        if not self._serves(forward, args, kwargs):
            return super().run(forward, *args, **kwargs)
        result = self._variant(*args, **kwargs)
        node = node_of(result)
        if node is not None:
            node.register_prehook(self._count)
        return result

    def _serves(self, forward: Forward, args: Any, kwargs: Any) -> bool:
        """Whether the variant may be called with such inputs."""
        if not self._possible or self._shared.foreign_random_states or self._shared.kept_inputs is not None:
            return False
        verdict = self._variant.known(args, kwargs) or self._judge(forward, args, kwargs)
        return verdict is not None and _is_recomputation(verdict)

    def _judge(self, forward: Forward, args: Any, kwargs: Any) -> Verdict | None:
        """The verdict on inputs of a new kind; if it is not to be had, or bad, that is said."""
        if self._variant.verdicts >= _MOST_VERDICTS:
            self._say(f"inputs have come in more than {_MOST_VERDICTS} shapes")
            return None
        try:
            verdict = self._variant.compare(forward, args, kwargs)
        except (torch._dynamo.exc.TorchDynamoException, torch.OutOfMemoryError) as error:
            self._possible = False
            self._say(f"the variant could not be compiled and compared: {error}")
            return None
        if not verdict.exact:
            self._say("the variant's gradients differ, as in half precision it rounds less often")
        elif not _is_recomputation(verdict):
            self._say(f"the variant holds {verdict.held_bytes} bytes for inputs of {verdict.input_bytes}")
        return verdict

    def _say(self, reason: str) -> None:
        line = f"gradckpt: recompute runs the compiled {type(self.block).__name__} again as a whole: {reason}"
        if line not in self._shared.said:
            logger.warning(line)
            self._shared.said.add(line)

    def _count(self, _gradients: Any) -> None:
        self.recomputes += 1


def _is_recomputation(verdict: Verdict) -> bool:
    return verdict.exact and verdict.held_bytes <= verdict.input_bytes + _RANDOM_STATE_BYTES


def node_of(result: Any) -> Any:
    """The node of the first output that has one, else None."""
    return next((leaf.grad_fn for leaf in tree_leaves(result) if getattr(leaf, "grad_fn", None) is not None), None)


def call_block(core: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What ``selective`` has compiled."""
    return core._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


def _checkpoint_block(core: nn.Module, *args: Any, **kwargs: Any) -> Any:
    def call(*values: Any) -> Any:
        return core._call_impl(*values, **kwargs)  # type: ignore[no-untyped-call]

    return checkpoint(call, *args, use_reentrant=False)
