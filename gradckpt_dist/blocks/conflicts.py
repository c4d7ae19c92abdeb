"""Mechanisms of others that would fight the switch over the same blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from gradckpt_dist.blocks import frameworks
from gradckpt_dist.blocks.attribute import is_switched
from gradckpt_dist.blocks.tree import Node, Tree
from gradckpt_dist.errors import ConflictError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradckpt_dist.blocks.discovery import Block


def check_conflicts(model: nn.Module, blocks: Sequence[Block]) -> None:
    """Refuse a model in which something that cannot be taken over checkpoints, offloads or compiles these blocks.

    Raises:
        ConflictError: what was found, where, and how to turn it off.
    """
    tree = Tree(model)
    checked: set[Node] = set()
    for block in blocks:
        node = tree.node_of(block.module)
        if node is None:
            raise ConflictError(f"block {block.name!r} is not a part of the given {type(model).__name__}")
        _check_chain(node)
        _check_inside(node)
        for ancestor in node.ancestors():
            if ancestor not in checked:
                checked.add(ancestor)
                _check_around(ancestor, node)
        _check_legacy_transformers(node)


def _check_chain(node: Node) -> None:
    """Refuse combinations of wrappers around one block."""
    position = node.chain.index(node.target)
    for module in node.chain:
        if frameworks.is_offload_wrapper(module):
            raise ConflictError(_offloaded(node.name))
    if any(frameworks.is_compiled(module) or frameworks.is_optimized(module) for module in node.chain[:position]):
        raise ConflictError(
            f"block {node.name!r}: its FSDP wrapper is compiled, and the block inside it is not; "
            "call block.compile() before the block is wrapped"
        )
    wrappers = [module for module in node.chain if frameworks.is_checkpoint_wrapper(module)]
    if len(wrappers) > 1 or (wrappers and (wrappers[0] is not node.target or frameworks.is_compiled(wrappers[0]))):
        raise ConflictError(
            f"block {node.name!r}: a CheckpointWrapper is compiled or wrapped again, so that it recomputes whatever "
            "the mask says; leave out checkpoint_wrapper / apply_activation_checkpointing"
        )


def _check_inside(node: Node) -> None:
    for name, module in node.core.named_modules():
        if module in node.chain:
            continue
        path = f"{node.name}.{name}"
        if frameworks.is_checkpoint_wrapper(module):
            raise ConflictError(
                f"{path!r} inside block {node.name!r} is a CheckpointWrapper, which would recompute a second time; "
                "leave out checkpoint_wrapper / apply_activation_checkpointing "
                "(fsdp_activation_checkpointing in Accelerate)"
            )
        if frameworks.is_offload_wrapper(module):
            raise ConflictError(_offloaded(path))
        if is_switched(module):
            raise ConflictError(_switched(path, node.name))


def _check_around(ancestor: Node, node: Node) -> None:
    where = f"{ancestor.name!r}" if ancestor.name else "the whole model"
    for module in ancestor.chain:
        if frameworks.is_compiled(module) or frameworks.is_optimized(module):
            raise ConflictError(
                f"{where} is compiled around block {node.name!r}: each mask would be another graph; compile each "
                "block by block.compile() instead of the model"
            )
        if frameworks.is_checkpoint_wrapper(module):
            raise ConflictError(
                f"{where} is a CheckpointWrapper around block {node.name!r}, which would recompute a second time; "
                "leave out checkpoint_wrapper / apply_activation_checkpointing, or wrap single blocks"
            )
        if frameworks.is_offload_wrapper(module):
            raise ConflictError(_offloaded(ancestor.name or "the model"))
        if is_switched(module):
            raise ConflictError(_switched(node.name, ancestor.name))
        if frameworks.is_replicated(module):
            raise ConflictError(
                f"{where} is under nn.DataParallel, which copies block {node.name!r} to other devices in each forward; "
                "start one process a device (torchrun, accelerate launch), or show it one device (CUDA_VISIBLE_DEVICES)"
            )
        if module.__dict__.get("grad_checkpointing") is True:
            raise ConflictError(
                f"{where} ({type(module).__name__}) checkpoints its blocks itself (grad_checkpointing=True, in timm); "
                "call model.set_grad_checkpointing(False) first"
            )
        taken_over = ancestor.parent is None and frameworks.is_deepspeed_pipeline(module)
        interval = 0 if taken_over else module.__dict__.get("activation_checkpoint_interval")
        if isinstance(interval, int) and interval > 0:
            raise ConflictError(
                f"{where} ({type(module).__name__}) checkpoints every {interval} layers itself; "
                "build the PipelineModule with activation_checkpoint_interval=0"
            )


def _check_legacy_transformers(node: Node) -> None:
    if any(frameworks.is_transformers_layer(module) for module in node.core.modules()):
        return  # their own checkpointing is held off by the switch
    for owner in _checkpointing_owners(node):
        raise ConflictError(
            f"{type(owner).__name__} checkpoints its layers itself (gradient_checkpointing is on) around block "
            f"{node.name!r}; call model.gradient_checkpointing_disable() first"
        )


def _checkpointing_owners(node: Node) -> Iterator[nn.Module]:
    for part in (node, *node.ancestors()):
        for module in part.chain:
            if module.__dict__.get("gradient_checkpointing") is True:
                yield module


def _offloaded(name: str) -> str:
    return (
        f"{name!r} is an OffloadWrapper, which moves the same activations to the CPU; "
        "leave out offload_wrapper for these modules"
    )


def _switched(inner: str, outer: str) -> str:
    return (
        f"{inner!r} inside {outer!r} is already switched by gradckpt_dist with other blocks; "
        "call disable() on the first engine, or give both the same blocks"
    )
