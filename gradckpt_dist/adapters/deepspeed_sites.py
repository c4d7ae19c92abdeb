"""Calls of ``deepspeed.checkpointing.checkpoint`` as blocks, for a model whose modules are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from gradckpt_dist.blocks import Block, BlockKind
from gradckpt_dist.blocks.attribute import SwitchedForward
from gradckpt_dist.config import LOSSY_STORAGES, Config
from gradckpt_dist.errors import BlocksNotFoundError, ConfigError


class CallSite(nn.Module):
    """Stands for one call in the model's forward; it owns nothing, and is no part of the model."""

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Call the function under the storage in force."""
        switched = self.__dict__.get("forward")
        return switched.instead(function, args) if isinstance(switched, SwitchedForward) else function(*args)


def call_site_blocks(calls: int | None, config: Config, error: BlocksNotFoundError) -> tuple[Block, ...]:
    """A block for each of the ``calls`` in a forward, of a model in which no modules were found.

    Raises:
        BlocksNotFoundError: it is not known how many there are.
        ConfigError: lossy storages are allowed, whose errors are judged by the parameters of a block.
    """
    if not calls:
        raise BlocksNotFoundError(
            f"{error}; or, if the model calls deepspeed.checkpointing.checkpoint itself, say how often in a forward by "
            "activation_checkpointing.number_checkpoints"
        ) from None
    lossy = sorted(set(config.storages) & set(LOSSY_STORAGES))
    if lossy:
        raise ConfigError(
            f"storages: {', '.join(lossy)} are lossy, and blocks that are calls of deepspeed.checkpointing.checkpoint "
            "can be stored exactly only; set gradient_tolerance to 0, or name modules under blocks"
        )
    return tuple(Block(name=f"checkpoint.{i}", module=CallSite(), kind=BlockKind.EAGER) for i in range(calls))
