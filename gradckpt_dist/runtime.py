"""What a switched block calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from gradckpt_dist.storage import Forward, Storage, StorageContext, create_storage
from gradckpt_dist.storage.noise import NoiseSource


class Watch(Protocol):
    """Looks on at one block's forward in a sampled step."""

    def reruns(self, index: int) -> bool:
        """Whether it will run the block's coming call again by itself."""

    def spoil(self) -> None:
        """The step's gradients were thrown away: it teaches nothing."""

    def __call__(self, index: int, storage: Storage, forward: Forward, args: Any, kwargs: Any) -> Any:
        """Call ``storage.run(forward, *args, **kwargs)``, look at the result and return it."""


class Gate:
    """Open while the root runs forward in training with gradients on; shared by the blocks of an engine.

    ``forwards`` counts those of the root; ``depth`` is above 0 while a block is in one. ``replayed``, where a framework
    has random states of its own, makes of a block's forward one that draws the same numbers each time it is run.
    ``change_seconds`` is what a change of mask costs by itself, whatever blocks it is of, as far as that is known.
    """

    __slots__ = ("change_seconds", "context", "depth", "forwards", "open", "replayed", "watch")

    def __init__(self, seed: int = 0) -> None:
        self.context = StorageContext(noise=NoiseSource(seed))
        self.open = False
        self.depth = 0
        self.forwards = 0
        self.change_seconds = 0.0
        self.replayed: Callable[[Forward], Forward] | None = None
        self.watch: Watch | None = None


class BlockRuntime:
    """Dispatches one block's forward to the storage in force."""

    __slots__ = ("_gate", "_index", "_module", "_storage", "_storages")

    def __init__(self, index: int, module: nn.Module, gate: Gate) -> None:
        self._index = index
        self._module = module
        self._gate = gate
        self._storages: dict[str, Storage] = {}
        self.use("keep")

    @property
    def reruns(self) -> bool:
        """Whether backward will call the block's forward again."""
        gate = self._gate
        if not gate.open or not torch.is_grad_enabled():
            return False
        return self._storage.reruns or (gate.watch is not None and gate.watch.reruns(self._index))

    @property
    def recomputes(self) -> int:
        """Times that the block was run again in full, since the engine was made."""
        return sum(storage.recomputes for storage in self._storages.values())

    def prepare(self, storage: str) -> None:
        """Make a storage, so that ``use`` cannot fail half-way through the blocks.

        Raises:
            StorageError: the storage cannot serve this block.
        """
        if storage not in self._storages:
            self._storages[storage] = create_storage(storage, self._module, self._gate.context)

    def use(self, storage: str) -> None:
        """Switch; a forward that has begun keeps the storage it began with.

        Raises:
            StorageError: as ``prepare``.
        """
        self.prepare(storage)
        self._storage = self._storages[storage]

    def __call__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        gate = self._gate
        if not gate.open or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if gate.replayed is not None:
            forward = gate.replayed(forward)
        gate.depth += 1
        try:
            if gate.watch is None:
                return self._storage.run(forward, *args, **kwargs)
            return gate.watch(self._index, self._storage, forward, args, kwargs)
        finally:
            gate.depth -= 1
