"""DeepSpeed: its JSON's ``gradckpt`` section, its groups, its pipelines, its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

from gradckpt_dist.adapters import deepspeed_pipeline as pipeline
from gradckpt_dist.adapters.base import Adapter
from gradckpt_dist.adapters.deepspeed_activations import ActivationSettings
from gradckpt_dist.adapters.deepspeed_calls import CallSites
from gradckpt_dist.adapters.deepspeed_parts import part
from gradckpt_dist.adapters.deepspeed_random import replay_random_states
from gradckpt_dist.adapters.deepspeed_sites import call_site_blocks
from gradckpt_dist.adapters.deepspeed_source import where_found
from gradckpt_dist.adapters.deepspeed_state import save_with_checkpoints
from gradckpt_dist.adapters.deepspeed_steps import watch_steps
from gradckpt_dist.blocks import Block, find_blocks
from gradckpt_dist.config import SECTION, Config
from gradckpt_dist.engine import Engine
from gradckpt_dist.errors import BlocksNotFoundError, ConfigError
from gradckpt_dist.policy import StaticPolicy

ZERO3_DEFAULTS = {"interval": 200, "hysteresis": 0.1}
"""ZeRO-3 records its prefetch trace anew at each change of mask, which should be rarer there."""


class DeepSpeedAdapter(Adapter):
    """For the engine that ``deepspeed.initialize`` returns, and for the ``PipelineModule`` that it calls."""

    framework = "deepspeed"

    def recognises(self, model: nn.Module) -> bool:
        is_engine = isinstance(model, part("runtime.engine").DeepSpeedEngine)
        return is_engine or pipeline.module_of(model) is model

    def config(self, model: nn.Module) -> Config | None:
        engine = _engine_of(model)
        if engine is None or SECTION not in (document := engine._config._param_dict):
            return None
        try:
            section = {} if document[SECTION] is None else document[SECTION]
            return Config.from_dict(section, lambda keys: self.completed(model, keys))
        except ConfigError as error:
            raise ConfigError(f"{where_found(document[SECTION])}: {error}") from None

    def completed(self, model: nn.Module, keys: Mapping[str, Any]) -> Mapping[str, Any]:
        engine = _engine_of(model)
        if engine is None:
            return keys
        if engine.zero_optimization_partition_weights():
            keys = {**ZERO3_DEFAULTS, **keys}
        if ActivationSettings.of(engine).cpu_checkpointing and keys.get("storages") is None:
            usual = Config.from_dict({key: keys[key] for key in keys if key == "gradient_tolerance"})
            keys = {**keys, "storages": [*usual.storages, "offload"]}
        return keys

    def blocks(self, model: nn.Module, config: Config, patterns: Sequence[str]) -> tuple[Block, ...]:
        module = pipeline.module_of(model)
        try:
            return find_blocks(model, patterns or (() if module is None else pipeline.layer_names(module)))
        except BlocksNotFoundError as error:
            if patterns:
                raise
            engine = _engine_of(model)
            calls = None if engine is None else ActivationSettings.of(engine).number_checkpoints
            return call_site_blocks(calls, config, error)

    def start(self, model: nn.Module, config: Config, blocks: int) -> tuple[str, ...] | None:
        engine = _engine_of(model)
        if engine is None or config.policy == StaticPolicy.name:
            return None
        return ActivationSettings.of(engine).start(blocks)

    def root(self, model: nn.Module) -> nn.Module:
        module = pipeline.module_of(model)
        return model if module is None else module

    def domain(self, model: nn.Module) -> ProcessGroup | None:
        return pipeline.stage_group(model)

    def attach(self, engine: Engine, model: nn.Module) -> Callable[[], None]:
        module, trainer = pipeline.module_of(model), _engine_of(model)
        undo = [CallSites(engine).install(), replay_random_states(engine)]
        if module is not None:
            undo.append(pipeline.take_over_checkpointing(module))
        if trainer is not None:
            ActivationSettings.of(trainer).apply(engine)
            undo += [save_with_checkpoints(engine, trainer), watch_steps(engine, trainer)]

        def undo_all() -> None:
            for call in reversed(undo):
                call()

        return undo_all


def _engine_of(model: nn.Module) -> Any:
    """The DeepSpeed engine itself, or the one that trains this pipeline; None before it was made."""
    module = pipeline.module_of(model)
    return model if module is None or module is not model else pipeline.trainer_of(module)
