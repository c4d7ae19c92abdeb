from __future__ import annotations

import pytest
import torch
from blocks_support import Stack, Switches, build
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
    offload_wrapper,
)

from gradckpt_dist.blocks import check_conflicts, find_blocks
from gradckpt_dist.errors import ConflictError


def test_a_compiled_model_around_its_blocks() -> None:
    model = build()
    model.compile(backend="eager")
    with pytest.raises(ConflictError, match=r"the whole model is compiled around block 'layers.0'.*block\.compile\(\)"):
        find_blocks(model)
    with pytest.raises(ConflictError, match="the whole model is compiled"):
        find_blocks(torch.compile(build(), backend="eager"))


def test_a_compiled_part_around_its_blocks_is_named() -> None:
    model = nn.ModuleDict({"encoder": build()})
    model["encoder"].compile(backend="eager")
    with pytest.raises(ConflictError, match=r"'encoder' is compiled around block 'encoder.layers.0'"):
        find_blocks(model, ["encoder.layers.*"])


def test_compiled_blocks_and_compiled_parts_of_blocks_are_no_conflict() -> None:
    model = build()
    for layer in model.layers:
        layer.compile(backend="eager")
    assert len(find_blocks(model)) == 3
    model = build()
    model.layers[0].up.compile(backend="eager")
    assert len(find_blocks(model)) == 3


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("inside", r"'layers.1.up' inside block 'layers.1' is a CheckpointWrapper.*leave out checkpoint_wrapper"),
        ("around", r"'layers' is a CheckpointWrapper around block 'layers.0'.*wrap single blocks"),
        ("twice", r"'layers.1': a CheckpointWrapper is compiled or wrapped again.*leave out checkpoint_wrapper"),
        ("compiled", r"'layers.1': a CheckpointWrapper is compiled or wrapped again"),
    ],
)
def test_checkpoint_wrappers_that_cannot_be_taken_over(place: str, message: str) -> None:
    model = build()
    if place == "inside":
        model.layers[1].up = checkpoint_wrapper(model.layers[1].up)
    elif place == "around":
        model.layers = checkpoint_wrapper(nn.Sequential(*model.layers))
    elif place == "twice":
        model.layers[1] = checkpoint_wrapper(checkpoint_wrapper(model.layers[1]))
    else:
        model.layers[1] = checkpoint_wrapper(model.layers[1])
        model.layers[1].compile(backend="eager")
    with pytest.raises(ConflictError, match=message):
        find_blocks(model)


@pytest.mark.parametrize("place", ["at", "inside", "around"])
def test_offload_wrappers(place: str) -> None:
    model = build()
    if place == "at":
        model.layers[0] = offload_wrapper(model.layers[0])
    elif place == "inside":
        model.layers[0].up = offload_wrapper(model.layers[0].up)
    else:
        model.layers = offload_wrapper(nn.Sequential(*model.layers))
    with pytest.raises(ConflictError, match=r"is an OffloadWrapper.*leave out offload_wrapper"):
        find_blocks(model)


def test_an_offload_wrapper_elsewhere_is_no_conflict() -> None:
    model = build()
    model.head = offload_wrapper(model.head)
    assert len(find_blocks(model)) == 3


def test_models_that_checkpoint_their_blocks_themselves() -> None:
    model = build()
    model.grad_checkpointing = True
    with pytest.raises(ConflictError, match=r"set_grad_checkpointing\(False\)"):
        find_blocks(model)
    model.grad_checkpointing = False
    model.gradient_checkpointing = True
    with pytest.raises(ConflictError, match=r"Stack checkpoints its layers itself.*gradient_checkpointing_disable\(\)"):
        find_blocks(model)
    model.gradient_checkpointing = False
    model.activation_checkpoint_interval = 2
    with pytest.raises(ConflictError, match="activation_checkpoint_interval=0"):
        find_blocks(model)
    model.activation_checkpoint_interval = 0
    assert len(find_blocks(model)) == 3


def test_data_parallel_over_several_devices() -> None:
    model = nn.DataParallel(build())
    assert len(find_blocks(model)) == 3
    model.device_ids = [0, 1]  # what it finds on a machine with two GPUs
    with pytest.raises(ConflictError, match=r"is under nn\.DataParallel.*torchrun"):
        find_blocks(model)


def test_blocks_that_cross_blocks_already_switched() -> None:
    model = build()
    switched = Switches(model)
    with pytest.raises(ConflictError, match=r"'layers.0' inside 'layers.0.up'|'layers.0.up' inside 'layers.0'"):
        find_blocks(model, ["layers.0.up"])
    switched.undo()
    assert len(find_blocks(model, ["layers.0.up"])) == 1


def test_blocks_of_another_model() -> None:
    with pytest.raises(ConflictError, match="not a part of the given Stack"):
        check_conflicts(build(), find_blocks(Stack()))
