"""torchtitan: the plugin as an activation checkpointing policy, beside ``SelectiveAC`` and ``FullAC``."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Annotated, Any, cast

import torch
from torch import nn

from gradckpt_dist.adapters import versions
from gradckpt_dist.api import enable, resolve_config
from gradckpt_dist.config import EXACT_STORAGES, Config
from gradckpt_dist.engine import Engine
from gradckpt_dist.errors import ConfigError

versions.require("torchtitan")

import tyro  # noqa: E402
from torchtitan.distributed import activation_checkpoint as titan  # noqa: E402

logger = logging.getLogger("gradckpt_dist")

_BLOCKS = "layers"


class GradckptAC(titan.ActivationCheckpointing):
    """Give ``GradckptAC.Config(...)`` as the trainer's ``activation_checkpoint``.

    ``apply`` comes before torchtitan compiles and shards the blocks, so that it only leaves a hook: the plugin is
    enabled at the model's first training forward, when they are what they stay. ``engine`` is there from then on.

    Raises:
        ConfigError: the configuration cannot be used, or asks for what belongs to checkpointing as torchtitan does it.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(titan.ActivationCheckpointing.Config):
        """The keys that most runs set; None leaves a key to the file. Random numbers are always preserved."""

        file: str | None = None
        """YAML or JSON with a ``gradckpt`` section; None: ``GRADCKPT_CONFIG``, or else the defaults."""

        memory_budget: float | str | None = None
        """A fraction from 0 (full recompute) to 1 (keep all), bytes a rank such as "40GiB", or "auto"."""

        gradient_tolerance: float | None = None
        """The relative error that the whole gradient may have; 0 allows exact storages only."""

        interval: int | None = None
        """Steps between decisions."""

        log_dir: str | None = None
        """Folder of the event log ``gradckpt.jsonl``."""

    def __init__(self, config: GradckptAC.Config, dump_folder: str = "") -> None:
        super().__init__(config, dump_folder)
        self.settings = _settings(config)
        self.engine: Engine | None = None

    def apply(self, model: nn.Module) -> None:
        """Have the plugin enabled on ``model.layers`` at the first training forward.

        Raises:
            AttributeError: the model has no ``layers``, as from torchtitan's own policies.
        """
        names = [f"{_BLOCKS}.{name}" for name, _ in model.get_submodule(_BLOCKS).named_children()]
        if self.settings.enabled:
            _AtFirstForward(self, model, names)
        logger.info("gradckpt: %s will be applied to %d blocks", type(self).__name__, len(names))


class _AtFirstForward:
    """A forward pre-hook of the model that enables the plugin and goes."""

    def __init__(self, policy: GradckptAC, model: nn.Module, names: list[str]) -> None:
        self._policy = policy
        self._names = names
        self._handle = model.register_forward_pre_hook(self)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, model: nn.Module, _: Any) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        self._handle.remove()
        settings = self._policy.settings
        engine = enable(model, settings, blocks=None if settings.blocks else self._names)
        self._policy.engine = engine
        engine.join_forward()


def _settings(config: GradckptAC.Config) -> Config:
    if config.debug or config.determinism_check != "default":
        raise ConfigError(
            f"debug {config.debug}, determinism_check {config.determinism_check!r}: GradckptAC has neither; leave them "
            "out, or select FullAC to look for a block that recomputes differently"
        )
    keys = ("memory_budget", "gradient_tolerance", "interval", "log_dir")
    given = {key: getattr(config, key) for key in keys if getattr(config, key) is not None}
    base = resolve_config(config.file)
    if base.storages == EXACT_STORAGES:
        given["storages"] = None  # what the tolerance allows
    return dataclasses.replace(base, **given)


ActivationCheckpointingConfig = cast(
    Any, titan.ActivationCheckpointingConfig | Annotated[GradckptAC.Config, tyro.conf.subcommand("gradckpt")]
)
"""torchtitan's type of that name, with ``gradckpt`` among its subcommands, for a trainer's Config of your own."""
