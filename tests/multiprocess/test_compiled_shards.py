"""Compiled blocks whose weights FSDP2 shards: variants are not compared, as that gathers weights, and so not used."""

from __future__ import annotations

import pytest
import torch
from frameworks import assert_bitwise
from meshes import Transformer, replica_of, train, transformer
from support import run_distributed_test
from torch.distributed.fsdp import fully_shard

import gradckpt_dist
from gradckpt_dist import StorageError

STEPS = 20


def _model() -> Transformer:
    """Norm and head, which come after the blocks, are gathered with the root, and stay so until the forward is over."""
    torch.compiler.reset()
    model = transformer(None)
    for block in model.blocks:
        block.compile(backend="aot_eager")
        fully_shard(block)
    fully_shard(model)
    return model


def _check() -> None:
    plain = train(_model(), STEPS, replica_of(1))
    for name in ("selective", "selective8"):
        model = _model()
        storages = ["keep", "recompute", name]
        config = {"policy": "static", "storages": storages, "gradient_tolerance": 0.5, "interval": 1000}
        engine = gradckpt_dist.enable(model, config)
        engine.set_mask([name] * len(model.blocks))
        with pytest.raises(StorageError, match=f"'{name}' is refused .* sharded"):
            train(model, 1, replica_of(1))
        engine.disable()
    model = _model()
    moving = {"storages": ["keep", "recompute", "selective"], "interval": 4, "warmup_steps": 0, "memory_budget": 0.5}
    engine = gradckpt_dist.enable(model, moving)
    assert_bitwise(train(model, STEPS, replica_of(1)), plain)
    assert engine.mask.epoch >= 3
    assert set(engine.mask.storages) <= {"keep", "recompute"}
    engine.disable()


def test_selective_is_refused_and_the_budget_policy_goes_without() -> None:
    run_distributed_test(_check, 2, timeout_seconds=250)
