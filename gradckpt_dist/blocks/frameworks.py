"""Classes of other frameworks, by name and without importing them."""

from __future__ import annotations

import sys

from torch import nn

_FSDP2 = ("torch.distributed.fsdp", "FSDPModule")


def is_fsdp1(module: nn.Module) -> bool:
    """Whether this is a ``FullyShardedDataParallel`` wrapper."""
    return _is_instance(module, "torch.distributed.fsdp", "FullyShardedDataParallel")


def is_fsdp2(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on this module."""
    return _is_instance(module, *_FSDP2)


def is_optimized(module: nn.Module) -> bool:
    """Whether this is what ``torch.compile(module)`` returned."""
    return _is_instance(module, "torch._dynamo.eval_frame", "OptimizedModule")


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called."""
    return module.__dict__.get("_compiled_call_impl") is not None


def is_checkpoint_wrapper(module: nn.Module) -> bool:
    """Whether this is PyTorch's ``CheckpointWrapper``."""
    return _is_instance(module, _WRAPPERS, "CheckpointWrapper")


def is_offload_wrapper(module: nn.Module) -> bool:
    """Whether this is PyTorch's ``OffloadWrapper``."""
    return _is_instance(module, _WRAPPERS, "OffloadWrapper")


def is_transformers_layer(module: nn.Module) -> bool:
    """Whether this is a transformers ``GradientCheckpointingLayer``."""
    return _is_instance(module, "transformers.modeling_layers", "GradientCheckpointingLayer")


def caches_exist() -> bool:
    """Whether a transformers cache can exist at all: transformers has been imported."""
    return "transformers" in sys.modules


def is_transformers_cache(value: object) -> bool:
    """Whether this is a key-value cache that a transformers layer writes into."""
    if _is_instance(value, "transformers.cache_utils", "Cache"):
        return True
    kind = type(value)
    return kind.__name__.endswith("Cache") and kind.__module__.startswith("transformers")


def is_data_parallel(module: nn.Module) -> bool:
    """Whether this is DistributedDataParallel, or DeepSpeed's engine: both hold the model as ``module``."""
    return _is_instance(module, "torch.nn.parallel.distributed", "DistributedDataParallel") or _is_instance(
        module, "deepspeed.runtime.engine", "DeepSpeedEngine"
    )


def is_replicated(module: nn.Module) -> bool:
    """Whether this is a ``DataParallel`` that copies its module to several devices in each forward."""
    return _is_instance(module, "torch.nn", "DataParallel") and len(getattr(module, "device_ids", ())) > 1


def is_deepspeed_pipeline(module: nn.Module) -> bool:
    """Whether this is DeepSpeed's ``PipelineModule``."""
    return _is_instance(module, "deepspeed.runtime.pipe.module", "PipelineModule")


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class as its author wrote it, without the subclass that ``fully_shard`` puts in its place."""
    sharded = _loaded_class(*_FSDP2)
    if sharded is None or not isinstance(module, sharded):
        return type(module)
    return next(k for k in type(module).__mro__ if issubclass(k, nn.Module) and not issubclass(k, sharded))


_WRAPPERS = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"


def _loaded_class(module_name: str, class_name: str) -> type | None:
    # An instance can only exist once its module has been imported.
    found = getattr(sys.modules.get(module_name), class_name, None)
    return found if isinstance(found, type) else None


def _is_instance(value: object, module_name: str, class_name: str) -> bool:
    kind = _loaded_class(module_name, class_name)
    return kind is not None and isinstance(value, kind)
