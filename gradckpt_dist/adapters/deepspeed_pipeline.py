"""DeepSpeed's pipelines: the blocks of a stage, the ranks that run them, and the checkpointing that they come with."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from gradckpt_dist.adapters.deepspeed_parts import part
from gradckpt_dist.errors import ConflictError
from gradckpt_dist.live_objects import live_objects

logger = logging.getLogger("gradckpt_dist")


def module_of(model: nn.Module) -> Any:
    """The ``PipelineModule`` that this is, or that this engine trains; None if there is none.

    A pipeline's engine calls its module past its own ``__call__``, so that its hooks do not run.
    """
    kind = part("runtime.pipe.module").PipelineModule
    inner = model if isinstance(model, kind) else getattr(model, "module", None)
    return inner if isinstance(inner, kind) else None


def trainer_of(module: nn.Module) -> Any:
    """The engine that trains this pipeline, which does not know it; None before it was made."""
    kind = part("runtime.pipe.engine").PipelineEngine
    return next((engine for engine in live_objects(kind) if engine.__dict__["_modules"].get("module") is module), None)


def layer_names(module: Any) -> tuple[str, ...]:
    """This stage's layers of the classes that occur more than once in the whole pipeline; else all with parameters.

    The same whatever ``activation_checkpoint_interval`` is. Layers that are tied to another stage's are no blocks.
    """
    counts = Counter(_layer_class(spec) for spec in module._layer_specs)
    owners = {name: layer for name, layer in module.named_children() if name in module.fwd_map}
    with_parameters = {name: layer for name, layer in owners.items() if next(layer.parameters(), None) is not None}
    repeated = tuple(name for name, layer in with_parameters.items() if counts[type(layer)] > 1)
    return repeated or tuple(with_parameters)


def stage_group(model: nn.Module) -> ProcessGroup | None:
    """The ranks of this rank's stage; None if there is one stage only.

    Raises:
        ConflictError: another ``mpu`` than DeepSpeed's own has stages of several tensor-parallel ranks each.
    """
    module = module_of(model)
    if module is None:
        return _mpu_stage_group(getattr(model, "mpu", None))
    grid = module._grid
    if grid.pipe_parallel_size == 1:
        return None
    if grid.model_parallel_size == 1:
        return _group(grid.get_data_parallel_group())
    ranks = sorted(module._topo.filter_match(pipe=module.stage_id))
    return _group(dist.new_group(ranks, use_local_synchronization=True))


def take_over_checkpointing(module: Any) -> Callable[[], None]:
    """Let the mask decide on each layer, in place of the pipeline's own checkpointing; the call undoes it."""
    interval = module.activation_checkpoint_interval
    if not interval:
        return lambda: None
    own = module.activation_checkpoint_func

    def run(function: Callable[..., Any], *inputs: Any) -> Any:
        return function(*inputs)

    module.activation_checkpoint_func = run
    if module.global_rank == 0:
        logger.info("gradckpt: activation_checkpoint_interval %d is taken over: each layer is a block", interval)

    def undo() -> None:
        if module.activation_checkpoint_func is run:
            module.activation_checkpoint_func = own

    return undo


def _mpu_stage_group(mpu: Any) -> ProcessGroup | None:
    known = part("utils.bwc")
    if mpu is None or known.bwc_pipeline_parallel_world_size(mpu) == 1:
        return None
    if known.bwc_tensor_model_parallel_world_size(mpu) == 1:
        return _group(mpu.get_data_parallel_group())
    raise ConflictError(
        f"{type(mpu).__name__} has pipeline stages of several tensor-parallel ranks each, and does not say which ranks "
        "share a stage; give them as enable(..., process_group=...)"
    )


def _layer_class(spec: Any) -> Any:
    return getattr(spec, "typename", type(spec))


def _group(group: Any) -> ProcessGroup | None:
    found: ProcessGroup | None = group
    return found
