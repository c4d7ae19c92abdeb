"""What every storage is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

from torch import nn

from gradckpt_dist.storage.context import StorageContext
from gradckpt_dist.storage.saved import Account

Forward = Callable[..., Any]


class Storage(ABC):
    """How one block's activations survive until its backward.

    One object serves one block. ``run`` is called once for each training forward of the block; a forward that has
    begun keeps the storage it began with, whatever happens to the mask before its backward.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    """Whether the gradients are bitwise those of ``keep``."""
    reruns: ClassVar[bool]
    """Whether the block's forward is called again, in full or in part: in backward, or beside the first call."""
    fetches_ahead: ClassVar[bool] = False
    """Whether what the block before holds so is brought back while this one is in backward."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.account = Account()
        """Counts what this storage holds by itself."""
        self.recomputes = 0
        """Times that the block's forward was run again in full in a backward pass."""

    @classmethod
    def create(cls, block: nn.Module, context: StorageContext) -> Self:
        """The storage of ``block``; one that shares something with those of other blocks takes it from ``context``."""
        return cls(block)

    @property
    def held_bytes(self) -> int:
        """Bytes on the device that this storage holds now by itself, outside of the tensors that autograd saves.

        Each storage counts once, compressed or not; parameters do not, but for copies of small ones.
        """
        return self.account.held_bytes

    @abstractmethod
    def run(self, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
        """Call ``forward(*args, **kwargs)`` and return its result, arranging what backward will find."""
