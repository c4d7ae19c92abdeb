from __future__ import annotations

import copy
import functools
import gc
import io
import subprocess
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks_support import Layer, Stack, StorageDispatch, Switches, build, gradients, instance_state, same, tokens
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from gradckpt_dist.blocks import BlockKind, BlockSwitch, find_blocks
from gradckpt_dist.errors import ConflictError

# torch.compile looks at the .grad of activations, under a filter for logging that a filter for errors overrides.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


def _loss(model: nn.Module) -> torch.Tensor:
    return model(tokens()).float().logsumexp(-1).sum()


def _wrap_with_checkpoint(model: Stack, **kwargs: Any) -> Stack:
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=functools.partial(checkpoint_wrapper, **kwargs),
        check_fn=lambda m: isinstance(m, Layer),
    )
    return model


def _model(kind: str) -> Stack:
    model = build()
    if kind == "compiled":
        for layer in model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
    elif kind == "optimized":
        for index, layer in enumerate(model.layers):
            model.layers[index] = torch.compile(layer, backend="aot_eager", fullgraph=True)
    elif kind == "checkpoint_wrapper":
        _wrap_with_checkpoint(model)
    elif kind == "instance_forward":
        for layer in model.layers:
            layer.forward = types.MethodType(_doubled_forward, layer)
    return model


def _doubled_forward(self: Layer, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    return Layer.forward(self, x, scale=2 * scale)


KINDS = ["eager", "compiled", "optimized", "checkpoint_wrapper", "instance_forward"]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_bitwise_those_of_the_unswitched_model_under_every_mask(kind: str) -> None:
    torch._dynamo.reset()
    model = _model(kind)
    expected = gradients(model, lambda: _loss(model))
    switched = Switches(model, "keep")
    for storages in (
        ["keep"] * 3,
        ["recompute"] * 3,
        ["recompute", "keep", "recompute"],
        ["keep", "recompute", "keep"],
    ):
        switched.set(storages)
        assert same(gradients(model, lambda: _loss(model)), expected)
        assert switched.recomputes == [int(storage == "recompute") for storage in storages]
    assert switched.calls == [4, 4, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_undo_leaves_every_instance_dict_as_it_was(kind: str) -> None:
    torch._dynamo.reset()
    model = _model(kind)
    before = instance_state(model)
    order = [list(module.__dict__) for module in model.modules()]
    switched = Switches(model)
    assert instance_state(model) != before
    _loss(model).backward()
    model.zero_grad(set_to_none=True)
    switched.undo()
    switched.undo()
    assert instance_state(model) == before
    assert [list(module.__dict__) for module in model.modules()] == order
    _loss(model).backward()
    assert switched.calls == [1, 1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_keys_and_repr_are_unchanged(kind: str) -> None:
    model = _model(kind)

    def surface() -> tuple[Any, ...]:
        names = [name for name, _ in model.named_modules()]
        return list(model.state_dict()), [name for name, _ in model.named_parameters()], names, repr(model)

    before = surface()
    Switches(model)
    assert surface() == before


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("eager", BlockKind.EAGER),
        ("compiled", BlockKind.COMPILED),
        ("optimized", BlockKind.OPTIMIZED),
        ("checkpoint_wrapper", BlockKind.CHECKPOINT_WRAPPER),
    ],
)
def test_kind_and_names(kind: str, expected: BlockKind) -> None:
    blocks = find_blocks(_model(kind))
    assert [block.name for block in blocks] == ["layers.0", "layers.1", "layers.2"]
    assert {block.kind for block in blocks} == {expected}


@pytest.mark.parametrize("kind", ["compiled", "optimized"])
def test_toggling_compiles_each_block_once_more_at_most(kind: str) -> None:
    torch._dynamo.reset()
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    model = build()
    for index, layer in enumerate(model.layers):
        if kind == "compiled":
            layer.compile(backend=backend, fullgraph=True)
        else:
            model.layers[index] = torch.compile(layer, backend=backend, fullgraph=True)
    _loss(model).backward()
    compiled = graphs
    assert 1 <= compiled <= 3
    switched = Switches(model, "keep")
    for storages in (["keep", "recompute", "keep"], ["recompute"] * 3, ["keep"] * 3, ["recompute", "keep", "keep"]):
        switched.set(storages)
        _loss(model).backward()
        assert graphs == 2 * compiled  # recompute has a graph of its own
    switched.undo()
    _loss(model).backward()
    assert graphs == 2 * compiled


@pytest.mark.parametrize("kind", ["compiled", "optimized"])
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_inductor_with_dropout_is_bitwise_too(kind: str) -> None:
    torch._dynamo.reset()
    model = build(2)
    for index, layer in enumerate(model.layers):
        if kind == "compiled":
            layer.compile()
        else:
            model.layers[index] = torch.compile(layer)
    expected = gradients(model, lambda: _loss(model))
    switched = Switches(model)
    assert same(gradients(model, lambda: _loss(model)), expected)
    assert switched.recomputes == [1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_never_runs_the_original_or_its_dispatch(kind: str) -> None:
    torch._dynamo.reset()
    model = _model(kind)
    expected = gradients(model, lambda: _loss(model))
    switched = Switches(model)
    clone = copy.deepcopy(model)
    assert same(gradients(clone, lambda: _loss(clone)), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    assert same(gradients(clone, lambda: _loss(clone)), expected)
    assert switched.calls == [0, 0, 0]
    again = Switches(clone)
    assert same(gradients(clone, lambda: _loss(clone)), expected)
    assert (again.calls, switched.calls) == ([1, 1, 1], [0, 0, 0])
    again.undo()
    twice = copy.deepcopy(clone)
    assert same(gradients(twice, lambda: _loss(twice)), expected)


@pytest.mark.parametrize("kind", ["eager", "checkpoint_wrapper", "compiled"])
def test_a_saved_model_loads_as_it_would_without_us(kind: str) -> None:
    torch._dynamo.reset()
    model = _model(kind)
    expected = gradients(model, lambda: _loss(model))
    switched = Switches(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert same(gradients(loaded, lambda: _loss(loaded)), expected)
    assert switched.calls == [0, 0, 0]
    for layer in loaded.layers:
        assert layer.forward.__self__ is layer


def test_a_saved_model_with_a_forward_of_its_own_keeps_it() -> None:
    model = build(2)
    for layer in model.layers:
        layer.forward = functools.partial(Layer.forward, layer)
    expected = gradients(model, lambda: _loss(model))
    Switches(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert isinstance(loaded.layers[0].forward, functools.partial)
    assert loaded.layers[0].forward.args == (loaded.layers[0],)
    assert same(gradients(loaded, lambda: _loss(loaded)), expected)


def test_a_saved_model_loads_in_a_process_without_this_package(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(2)))
    Switches(model)
    x = torch.ones(1, 3, 8)
    expected = model(x).sum().item()
    torch.save(model, tmp_path / "model.pt")
    script = (
        "import sys, torch\n"
        "sys.modules['gradckpt_dist'] = None\n"
        "model = torch.load('model.pt', weights_only=False)\n"
        "print(repr(model(torch.ones(1, 3, 8)).sum().item()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(done.stdout) == expected


def test_switching_twice_is_a_conflict_that_says_what_to_do() -> None:
    model = build()
    first = Switches(model)
    block = find_blocks(model)[0]
    with pytest.raises(ConflictError, match=r"'layers.0' is already switched; call disable\(\)"):
        BlockSwitch(block, StorageDispatch(block)).install()
    first.undo()
    switch = BlockSwitch(block, StorageDispatch(block))
    switch.install()
    with pytest.raises(ConflictError, match="already switched"):
        switch.install()
    switch.undo()


def test_undo_between_forward_and_backward_leaves_the_gradients_alone() -> None:
    model = build()
    expected = gradients(model, lambda: _loss(model))
    switched = Switches(model)

    def loss() -> torch.Tensor:
        value = _loss(model)
        switched.undo()
        return value

    assert same(gradients(model, loss), expected)
    assert switched.recomputes == [1, 1, 1]


def test_a_forward_put_in_front_of_ours_survives_undo_and_reaches_the_original() -> None:
    model = build()
    expected = gradients(model, lambda: _loss(model))
    switched = Switches(model)
    layer = model.layers[0]
    ours = layer.forward
    layer.forward = functools.partial(ours)
    theirs = layer.forward
    switched.undo()
    assert layer.__dict__["forward"] is theirs
    assert same(gradients(model, lambda: _loss(model)), expected)
    assert switched.calls == [0, 0, 0]


def test_hooks_of_an_eager_block_run_once_with_recomputation() -> None:
    model = build()
    counts = {"pre": 0, "post": 0}
    model.layers[1].register_forward_pre_hook(lambda *_: counts.__setitem__("pre", counts["pre"] + 1))
    model.layers[1].register_forward_hook(lambda *_: counts.__setitem__("post", counts["post"] + 1))
    Switches(model)
    _loss(model).backward()
    assert counts == {"pre": 1, "post": 1}


@pytest.mark.parametrize("implementation", [CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT])
def test_a_checkpoint_wrapper_without_preserved_rng_becomes_exact(implementation: CheckpointImpl) -> None:
    plain = build()
    expected = gradients(plain, lambda: _loss(plain))
    model = _wrap_with_checkpoint(build(), checkpoint_impl=implementation, preserve_rng_state=False)
    wrapper = model.layers[0]
    before = dict(wrapper.__dict__)
    switched = Switches(model)
    assert same(gradients(model, lambda: _loss(model)), expected)
    assert switched.recomputes == [1, 1, 1]
    switched.set(["keep"] * 3)
    assert same(gradients(model, lambda: _loss(model)), expected)
    switched.undo()
    assert wrapper.__dict__ == before
    assert not same(gradients(model, lambda: _loss(model)), expected)


def test_a_dropped_model_is_freed_while_switched() -> None:
    model = build()
    gone = weakref.ref(model.layers[0])
    switched = Switches(model)
    del model, switched
    gc.collect()
    assert gone() is None
