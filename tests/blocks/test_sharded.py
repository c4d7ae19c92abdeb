"""Blocks under real process groups: names, gradients and all-gathers are those of the model without us."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from blocks_support import Layer, Stack, Switches, build, gradients, same, tokens
from support import run_distributed_test
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from gradckpt_dist.blocks import find_blocks

NAMES = ["layers.0", "layers.1", "layers.2"]
MASKS = (["recompute"] * 3, ["keep", "recompute", "keep"], ["keep"] * 3)


class Nested(nn.Module):
    """An encoder and a decoder, each a stack: every one of them may be a wrap unit too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Stack(2), Stack(2)


def _ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def _fsdp1(model: nn.Module, use_orig_params: bool = True, units: tuple[type[nn.Module], ...] = (Layer,)) -> nn.Module:
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy(units),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )


def _fsdp1_flat(model: nn.Module) -> nn.Module:
    return _fsdp1(model, use_orig_params=False)


def _fsdp1_with_embedding(model: nn.Module) -> nn.Module:
    return _fsdp1(model, units=(Layer, nn.Embedding))


def _fsdp1_nested(model: nn.Module) -> nn.Module:
    return _fsdp1(model, units=(Layer, nn.Linear))


def _fsdp1_root_only(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=False, device_id=torch.device("cpu"))


def _fsdp2(model: nn.Module) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer)
    fully_shard([model.embed, model.head])
    return fully_shard(model)


def _fsdp2_compiled(model: nn.Module) -> nn.Module:
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    return _fsdp2(model)


def _fsdp2_checkpointed(model: nn.Module) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Layer))
    return _fsdp2(model)


def _fsdp1_checkpointed(model: nn.Module) -> nn.Module:
    model = _fsdp1(model)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Layer))
    return model


WRAPPINGS = {
    "ddp": (_ddp,),
    "fsdp1": (_fsdp1, _fsdp1_flat, _fsdp1_with_embedding, _fsdp1_nested, _fsdp1_root_only, _fsdp1_checkpointed),
    "fsdp2": (_fsdp2, _fsdp2_compiled, _fsdp2_checkpointed),
}


def _count_gathers(model: nn.Module) -> tuple[list[torch.Tensor | None], int]:
    """Gradients of one step, and how many times parameters were gathered for it."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        found = gradients(model, lambda: _loss(model))
    events = [event.name for event in recorded.events() if event.name.startswith("c10d::")]
    return found, sum("allgather" in name for name in events)


def _loss(model: nn.Module) -> torch.Tensor:
    return model(tokens(dist.get_rank() + 1)).logsumexp(-1).sum()


def _surface(model: nn.Module) -> tuple[Any, ...]:
    names = [name for name, _ in model.named_modules()]
    return list(model.state_dict()), [name for name, _ in model.named_parameters()], names, repr(model)


def _local(found: list[Any]) -> list[Any]:
    return [g.to_local() if hasattr(g, "to_local") else g for g in found]


def _check_wrappings(framework: str) -> None:
    for wrap in WRAPPINGS[framework]:
        _check_wrapping(wrap)


def _check_wrapping(wrap: Callable[[nn.Module], nn.Module]) -> None:
    before = Switches(plain := build(), "keep")
    early = wrap(plain) if wrap in (_ddp, _fsdp1, _fsdp1_flat, _fsdp2) else None
    model = wrap(build())
    surface = _surface(model)
    gradients(model, lambda: _loss(model))  # FSDP settles its order of execution
    found, expected_gathers = _count_gathers(model)
    expected = _local(found)
    assert (expected_gathers > 0) == (wrap is not _ddp)
    switched = Switches(model, "keep")
    assert switched.names == before.names == NAMES, wrap
    assert _surface(model) == surface, wrap
    gradients(model, lambda: _loss(model))
    for storages in MASKS:
        switched.set(storages)
        found, gathers = _count_gathers(model)
        assert same(_local(found), expected), wrap
        # Units inside a block are gathered once more for its recomputation, as under PyTorch's own checkpointing.
        assert gathers == expected_gathers or (wrap is _fsdp1_nested and "recompute" in storages), wrap
        assert switched.recomputes == [int(storage == "recompute") for storage in storages], wrap
    switched.undo()
    assert same(_local(gradients(model, lambda: _loss(model))), expected)
    if early is not None:
        before.set(["recompute"] * 3)
        assert same(_local(gradients(early, lambda: _loss(early))), expected)
        assert before.recomputes == [1, 1, 1]


@pytest.mark.parametrize("framework", WRAPPINGS)
def test_names_gradients_and_gathers_of_two_ranks(framework: str) -> None:
    run_distributed_test(_check_wrappings, 2, framework)


def _check_nested_units() -> None:
    expected = [block.name for block in find_blocks(Nested())]
    assert expected == ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"]
    assert [b.name for b in find_blocks(_fsdp1(Nested(), units=(Stack, Layer)))] == expected
    sharded = Nested()
    for stack in (sharded.encoder, sharded.decoder):
        for layer in stack.layers:
            fully_shard(layer.up)
            fully_shard(layer)
        fully_shard(stack)
    fully_shard(sharded)
    assert isinstance(sharded.encoder.layers[0].up, FSDPModule)
    assert [block.name for block in find_blocks(sharded)] == expected
    root_only = fully_shard(Nested())
    assert [block.name for block in find_blocks(root_only)] == expected


def _check_units_without_a_list() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.first, self.second = nn.Embedding(16, 8), Layer(), Layer()

    model = Flat()
    for part in (model.embed, model.first, model.second):
        fully_shard(part)
    fully_shard(model)
    assert [block.name for block in find_blocks(model)] == ["first", "second"]
    model = Flat()
    for part in (model.embed, model.first):
        fully_shard(part)
    assert [block.name for block in find_blocks(model)] == ["embed", "first"]


def test_the_blocks_among_nested_units() -> None:
    run_distributed_test(_check_nested_units, 2)


def test_units_outside_of_lists() -> None:
    run_distributed_test(_check_units_without_a_list, 1)
