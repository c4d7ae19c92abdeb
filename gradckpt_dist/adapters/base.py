"""The base of adapters: how ``enable`` asks a framework. Its answers are those for a model of no framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from gradckpt_dist.agreement import Domain, domain_of
from gradckpt_dist.blocks import Block, find_blocks
from gradckpt_dist.config import Config
from gradckpt_dist.engine import Engine


class Adapter:
    """One framework's answers; a subclass overrides what its framework knows, and keeps no state."""

    framework: str | None = None
    """The top-level module whose presence in ``sys.modules`` is needed before a model can be of this framework."""

    def recognises(self, model: nn.Module) -> bool:
        """Whether ``model`` is this framework's."""
        return True

    def config(self, model: nn.Module) -> Config | None:
        """What the framework's own configuration says of this plugin; None if it says nothing.

        Raises:
            ConfigError: it says something that cannot be used; the message names the file or the section.
        """
        return None

    def completed(self, model: nn.Module, keys: Mapping[str, Any]) -> Mapping[str, Any]:
        """The keys that a user gave, and the framework's defaults for those that were left out."""
        return keys

    def blocks(self, model: nn.Module, config: Config, patterns: Sequence[str]) -> tuple[Block, ...]:
        """The blocks: those that match the patterns, or without patterns those that are found.

        Raises:
            BlocksNotFoundError: there are none.
            ConflictError: something that cannot be taken over checkpoints them already.
        """
        return find_blocks(model, patterns)

    def start(self, model: nn.Module, config: Config, blocks: int) -> tuple[str, ...] | None:
        """The first mask that the framework's configuration asks for; None for the policy's."""
        return None

    def root(self, model: nn.Module) -> nn.Module:
        """The module whose forward is called once for each micro-batch."""
        return model

    def domain(self, model: nn.Module) -> Domain | None:
        """The ranks that run the same blocks; None for all."""
        return domain_of(model)

    def attach(self, engine: Engine, model: nn.Module) -> Callable[[], None]:
        """Tie the running engine to the framework, saving and loading of state for example; the call undoes it."""
        return _nothing


def _nothing() -> None: ...
