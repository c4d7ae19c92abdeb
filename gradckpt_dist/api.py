"""``enable``: from a model and a configuration to a running engine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from gradckpt_dist.adapters import Adapter, adapter_of, follow_join
from gradckpt_dist.agreement import create_agreement
from gradckpt_dist.blocks import Block
from gradckpt_dist.boundary import stepping
from gradckpt_dist.config import Complete, Config
from gradckpt_dist.cost.kind import kinds_of
from gradckpt_dist.engine import Engine
from gradckpt_dist.errors import BlocksNotFoundError, ConfigError, GradckptError
from gradckpt_dist.storage import STORAGES
from gradckpt_dist.version import __version__

CONFIG_VARIABLE = "GRADCKPT_CONFIG"

_OWN_TO_A_RANK = ("log_dir", "log_level")

ConfigLike = Config | Mapping[str, Any] | str | Path | None


def enable(
    model: nn.Module,
    config: ConfigLike = None,
    *,
    blocks: Sequence[str] | None = None,
    process_group: ProcessGroup | None = None,
    optimizer: Optimizer | None = None,
) -> Engine:
    """Put ``model``'s blocks under one checkpoint mask, agreed by all ranks of ``process_group``.

    Call it on every rank, before or after wrapping for DDP or FSDP, on the module that the training loop calls or on
    the one inside. ``config`` is a ``Config``, its keys, a file with a ``gradckpt`` section, or None: then the section
    in the framework's own configuration, or the file that ``GRADCKPT_CONFIG`` names, or else the defaults. ``blocks``
    gives names or globs in place of ``config.blocks``. ``process_group`` is the domain (default: as the model
    says, or all ranks). ``optimizer`` is the one whose step ends a training step (default: any); it may be in a wrapper
    of Accelerate's or DeepSpeed's.

    Raises:
        ConfigError: the configuration cannot be used.
        BlocksNotFoundError: no block was found, or a given name matches none.
        ConflictError: something else already checkpoints, offloads or compiles these blocks, this plugin included.
        AgreementError: another rank has other blocks, another configuration or another version, or did not come.
    """
    error: GradckptError | None = None
    found: tuple[Block, ...] = ()
    settings = Config()
    adapter = adapter_of(model)
    try:
        settings = _settings(config, adapter, model)
        found = _blocks(model, settings, blocks, adapter)
        optimizer = None if optimizer is None else stepping(optimizer)
    except GradckptError as raised:
        error = raised
    device = _device(model)
    group = process_group if process_group is not None else adapter.domain(model)
    agreement = create_agreement(group, device, settings.agreement_timeout_s)
    try:
        start = None if error is not None else adapter.start(model, settings, len(found))
        agreement.compare(_facts(settings, found, start, error))
    finally:
        if error is not None:
            raise error
    engine = Engine(found, settings, agreement, device, start)
    if settings.enabled:
        engine.install(adapter.root(model), optimizer)
        engine.on_disable(adapter.attach(engine, model))
        engine.on_disable(follow_join(engine, model))
    return engine


def _settings(config: ConfigLike, adapter: Adapter, model: nn.Module) -> Config:
    if config is None:
        config = adapter.config(model)
    return resolve_config(config, lambda keys: adapter.completed(model, keys))


def resolve_config(config: ConfigLike, complete: Complete = dict) -> Config:
    """The configuration that ``enable`` would use; ``complete`` adds defaults to the keys that were given.

    Raises:
        ConfigError: it cannot be used.
    """
    settings = _read(config, complete)
    missing = [name for name in settings.storages if name not in STORAGES]
    if missing:
        raise ConfigError(f"storages: {', '.join(missing)} not in this version; it has {', '.join(STORAGES)}")
    return settings


def _read(config: ConfigLike, complete: Complete) -> Config:
    if isinstance(config, Config):
        return config
    if isinstance(config, Mapping):
        return Config.from_dict(config, complete)
    path = config if config is not None else os.environ.get(CONFIG_VARIABLE)
    return Config.from_file(path, complete) if path else Config.from_dict({}, complete)


def _blocks(model: nn.Module, config: Config, given: Sequence[str] | None, adapter: Adapter) -> tuple[Block, ...]:
    if not config.enabled:
        return ()
    patterns = config.blocks if given is None else tuple(given)
    if given is not None and not patterns:
        raise BlocksNotFoundError("blocks=[] names no block; give names or globs, or leave it out to have them found")
    return adapter.blocks(model, config, patterns)


def _facts(
    config: Config, blocks: Sequence[Block], start: tuple[str, ...] | None, error: GradckptError | None
) -> dict[str, Any]:
    """What must be equal on all ranks, in the order in which a difference is reported."""
    shared = {f"config.{key}": value for key, value in config.to_dict().items() if key not in _OWN_TO_A_RANK}
    return {
        "error": None if error is None else f"{type(error).__name__}: {error}",
        "version": __version__,
        **shared,
        "blocks": [block.name for block in blocks],
        "kinds": list(kinds_of([block.module for block in blocks])),
        "start": None if start is None else list(start),
    }


def _device(model: nn.Module) -> torch.device:
    """Where the model computes: its first parameter that is not on the host, else the host."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type not in {"cpu", "meta"}), torch.device("cpu"))
