"""The base of adapters: how ``enable`` asks a framework. Its answers are those for a model of no framework."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from gradckpt_dist.agreement import Domain, domain_of
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

    def domain(self, model: nn.Module) -> Domain | None:
        """The ranks that run the same blocks; None for all."""
        return domain_of(model)

    def attach(self, engine: Engine, model: nn.Module) -> Callable[[], None]:
        """Tie the running engine to the framework, saving and loading of state for example; the call undoes it."""
        return _nothing


def _nothing() -> None: ...
