"""``selective`` and ``selective_half``: recompute, with the outputs of chosen operations held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import _StopRecomputationError

from gradckpt_dist.storage.context import StorageContext
from gradckpt_dist.storage.half_choice import Cost, HalfChoice, HalfChoices, HalfSelection
from gradckpt_dist.storage.ledger import is_parameter, storage_bytes
from gradckpt_dist.storage.operation_cache import Entry, OperationCache, save
from gradckpt_dist.storage.operations import autocast_of, device_of, inner_tensors
from gradckpt_dist.storage.recompute import Passes, Recompute
from gradckpt_dist.storage.recorder import AllExpensive, Recorder, Replayer, Selection
from gradckpt_dist.storage.stopwatch import Stopwatch


class Selective(Recompute):
    """Runs no matrix product, convolution, attention, collective or routing decision a second time.

    Weights that are gathered inside the block are gathered again, as no more than their shards may be held.
    Their outputs are held under the saved-tensor hooks that are in force around the block, so that they count, and
    move, like the tensors that autograd saves; each is let go as the run in backward takes it. A second backward
    through a retained graph runs everything again. ``recomputes`` counts runs in backward that found nothing held.
    Only writes in place that PyTorch dispatches are seen: a kernel that is called past it must not write to the output
    of a matrix product.
    """

    name = "selective"

    def _passes(self, inputs: tuple[Any, ...]) -> Passes:
        return SelectivePasses(self, AllExpensive(gathers_of=self.block))


class SelectiveHalf(Selective):
    """Holds at most half of what ``keep`` does, inputs included: the outputs that save the most time for their bytes.

    What was gathered is gathered again.

    The first calls of each kind of block (class, structure, parameters, inputs, autocast) are profiled; all blocks of
    that kind share the choice. Ranks may choose differently, which changes no gradient: what may communicate is always
    held, and its bytes are taken from the half.
    """

    name = "selective_half"

    def __init__(self, block: nn.Module, choices: HalfChoices) -> None:
        super().__init__(block)
        self._choices = choices
        parameters = ((p.shape, p.dtype, p.requires_grad) for p in block.parameters())
        self._kind: tuple[Any, ...] = (type(block), repr(block), *parameters)

    @classmethod
    def create(cls, block: nn.Module, context: StorageContext) -> Self:
        return cls(block, context.half_choices)

    def _passes(self, inputs: tuple[Any, ...]) -> Passes:
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
        kind = (*self._kind, *((t.dtype, t.device, t.requires_grad) for t in tensors), *autocast_of(tensors))
        choice = self._choices.find(kind, tuple(t.shape for t in tensors))
        if choice.settled:
            return SelectivePasses(self, choice.selection)
        return _ProfiledPasses(self, choice, tensors)


class SelectivePasses:
    """One call of a block."""

    def __init__(self, storage: Selective, selection: Selection) -> None:
        self._storage = storage
        self._selection = selection
        self._cache = OperationCache()

    @contextmanager
    def around(self) -> Iterator[None]:
        yield
        self._cache.seal(save)

    @contextmanager
    def first(self) -> Iterator[None]:
        with self._cache.counting(), Recorder(self._cache, self._selection):
            yield

    @contextmanager
    def again(self) -> Iterator[None]:
        cache = self._cache
        cache.rewind()
        try:
            with Replayer(cache, self._selection):
                yield
        except _StopRecomputationError:
            cache.finish()
            raise
        else:
            cache.finish()
        finally:
            self._storage.recomputes += not cache.given


class _ProfiledPasses(SelectivePasses):
    """One call of a block of which it is not yet settled what to hold."""

    def __init__(self, storage: Selective, choice: HalfChoice, inputs: list[torch.Tensor]) -> None:
        super().__init__(storage, HalfSelection())
        self._choice = choice
        self._stopwatch = Stopwatch(device_of(inputs))
        self._input_bytes = storage_bytes(inputs)
        # The weak references keep a storage's identity from being used again while it is a key.
        self._kept_bytes: dict[StorageWeakRef, int] = {}

    @contextmanager
    def around(self) -> Iterator[None]:
        with super().around():
            yield
            self._choose()

    @contextmanager
    def first(self) -> Iterator[None]:
        with self._cache.counting(self._see), Recorder(self._cache, self._selection, self._stopwatch):
            yield

    def _choose(self) -> None:
        needed = [entry for entry in self._cache.entries() if entry.packs < self._cache.packs]
        held = self._input_bytes | storage_bytes([entry.leaves for entry in needed if entry.fixed])
        limit_bytes = sum(self._kept_bytes.values()) // 2 - sum(held.values())
        self._kept_bytes.clear()
        self._stopwatch.wait()
        open_to_choice = [entry for entry in needed if not entry.fixed]
        costs = {entry.occurrence: _cost(entry, held) for entry in open_to_choice if entry.leaves is not None}
        chosen = self._choice.learn(costs, limit_bytes)
        for entry in open_to_choice:
            if entry.occurrence not in chosen:
                entry.drop()

    def _see(self, tensor: torch.Tensor) -> None:
        if not is_parameter(tensor):
            for inner in inner_tensors(tensor):
                storage = inner.untyped_storage()
                self._kept_bytes.setdefault(StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]


def _cost(entry: Entry, held: Mapping[int, int]) -> Cost:
    new_bytes = sum(size for key, size in storage_bytes(entry.leaves).items() if key not in held)
    return Cost(seconds=entry.seconds() if entry.seconds is not None else 0.0, held_bytes=new_bytes)
