"""Recomputation inside the compiled backward, and where the compiled block is run again as a whole instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from text_model import Block
from torch import Tensor, nn

from gradckpt_dist import StorageError
from gradckpt_dist.storage import Storage, StorageContext, create_storage, variant
from gradckpt_dist.storage.compiled import CompiledSelectiveHalf
from gradckpt_dist.storage.keep import Keep
from gradckpt_dist.storage.kept_inputs import KeptInputs
from gradckpt_dist.storage.recompute import Recompute

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

WHOLE = "again as a whole"


class Counted:
    """The forward that a storage is given, and how often it calls it."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self._block(*args, **kwargs)


class Branched(nn.Module):
    """Takes keywords, gives two tensors; torch.compile breaks its graph where ``broken``."""

    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)
        self.broken = broken

    def forward(self, x: Tensor, *, scale: float, shift: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = torch.nn.functional.gelu(self.first(x)) + shift
        if self.broken:
            torch._dynamo.graph_break()
        return self.second(hidden * scale), {"hidden": hidden.tanh()}


def _step(storage: Storage, forward: Any, block: nn.Module, x: Tensor, **kwargs: Any) -> list[Tensor]:
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    outputs = [leaf for leaf in torch.utils._pytree.tree_leaves(storage.run(forward, x, **kwargs))]
    loss = sum((output.float().square().sum() for output in outputs), torch.zeros(()))
    gradients = torch.autograd.grad(loss, [x, *block.parameters()])
    return [*(output.detach() for output in outputs), *gradients, torch.rand(1)]


def _assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def _saved_bytes(storage: Storage, block: nn.Module, x: Tensor) -> int:
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = storage.run(block, x)
    weights = {parameter.untyped_storage()._cdata for parameter in block.parameters()}
    del output
    return sum(size for key, size in seen.items() if key not in weights)


@pytest.mark.parametrize(("wrap", "dropout"), [("compile()", 0.0), ("torch.compile", 0.2)])
def test_backward_computes_again_what_it_needs(wrap: str, dropout: float, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    block: nn.Module = Block(64, 4, dropout)
    if wrap == "compile()":
        block.compile()
    else:
        block = torch.compile(block)
    x = torch.randn(4, 128, 64)
    reference = _step(Keep(block), block, block, x)
    storage, forward = create_storage("recompute", block), Counted(block)
    _assert_same(_step(storage, forward, block, x), reference)
    assert storage.recomputes == 1
    compared = forward.calls
    _assert_same(_step(storage, forward, block, x), reference)
    assert (storage.recomputes, forward.calls) == (2, compared)
    assert WHOLE not in caplog.text
    # Besides, one state of the generator is held, and a seed.
    assert 0 <= _saved_bytes(storage, block, x.requires_grad_()) - x.nbytes <= 64 + torch.get_rng_state().nbytes


def test_half_precision_is_run_again_as_a_whole_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    context = StorageContext()
    blocks = [Block(64, 4, 0.0).bfloat16() for _ in range(2)]
    x = torch.randn(4, 128, 64, dtype=torch.bfloat16)
    for block in blocks:
        block.compile()
        storage, forward = create_storage("recompute", block, context), Counted(block)
        _assert_same(_step(storage, forward, block, x), _step(Keep(block), block, block, x))
        assert storage.recomputes == 1
    assert caplog.text.count(WHOLE) == 1
    assert "rounds less often" in caplog.text
    assert forward.calls == 2  # the second block is of the same structure: nothing to compare


@pytest.mark.parametrize("broken", [False, True])
def test_keywords_several_outputs_and_broken_graphs(broken: bool) -> None:
    torch.manual_seed(0)
    block = Branched(broken)
    block.compile()
    x, shift = torch.randn(16, 32), torch.randn(64)
    reference = _step(Keep(block), block, block, x, scale=0.5, shift=shift)
    storage = create_storage("recompute", block)
    for _ in range(2):
        _assert_same(_step(storage, block, block, x, scale=0.5, shift=shift), reference)
    assert storage.recomputes == 2


def test_what_does_not_compile_is_run_again_as_a_whole(caplog: pytest.LogCaptureFixture) -> None:
    def refusing(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        if any("checkpoint" in str(node.target) for node in graph.graph.nodes):
            raise NotImplementedError("no checkpoints here")
        return graph

    torch.manual_seed(0)
    block = Block(64, 4, 0.1)
    block.compile(backend=refusing)
    x = torch.randn(2, 16, 64)
    storage = create_storage("recompute", block)
    _assert_same(_step(storage, block, block, x), _step(Keep(block), block, block, x))
    assert storage.recomputes == 1
    assert WHOLE in caplog.text
    assert "no checkpoints here" in caplog.text


def test_ever_new_shapes_are_not_all_compared(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    block = Branched(broken=False)
    block.compile(backend="aot_eager", dynamic=True)
    storage, forward, shift = create_storage("recompute", block), Counted(block), torch.randn(64)
    for length in range(2, 13):
        forward.calls = 0
        x = torch.randn(length, 32)
        ours = _step(storage, forward, block, x, scale=0.5, shift=shift)
        assert forward.calls == (1 if length < 10 else 2)  # compared once; then forward and recomputation
        _assert_same(ours, _step(Keep(block), block, block, x, scale=0.5, shift=shift))
    assert storage.recomputes == 11
    assert caplog.text.count("more than 8 shapes") == 1


@pytest.mark.parametrize("reason", ["shards", "inputs", "random states"])
def test_what_frameworks_see_to_is_left_to_checkpoint(reason: str) -> None:
    torch.manual_seed(0)
    block, context = Branched(broken=False), StorageContext()
    if reason == "shards":
        block.first.weight.ds_id = 0  # type: ignore[assignment]
    elif reason == "inputs":
        context.kept_inputs = KeptInputs()
    else:
        context.foreign_random_states = True
    block.compile(backend="aot_eager")
    storage, forward = create_storage("recompute", block, context), Counted(block)
    x, shift = torch.randn(4, 32), torch.randn(64)
    _step(storage, forward, block, x, scale=0.5, shift=shift)
    assert (forward.calls, storage.recomputes) == (2, 1)


def test_blocks_of_one_class_are_compared_by_structure_and_mode() -> None:
    x = torch.randn(4, 256, 256)
    certain, random = Block(256, 4, 0.0), Block(256, 4, 0.1)
    for block in (certain, random):
        block.compile()
    CompiledSelectiveHalf(certain).run(certain, x)
    with pytest.raises(StorageError, match="pytorch#190758"):
        CompiledSelectiveHalf(random).run(random, x)
    random.eval()
    storage = CompiledSelectiveHalf(random)
    storage.run(random, x)
    random.train()
    with pytest.raises(StorageError, match="pytorch#190758"):
        storage.run(random, x)


def test_hooks_of_parameters_see_one_gradient_a_step() -> None:
    torch.manual_seed(0)
    block = Block(64, 4, 0.0)
    block.compile(backend="aot_eager")
    seen: list[Tensor] = []
    block.qkv.weight.register_hook(seen.append)
    storage = create_storage("recompute", block)
    for _ in range(2):
        storage.run(block, torch.randn(2, 16, 64)).sum().backward()
    assert len(seen) == 2


def test_an_eager_block_has_no_variant() -> None:
    assert type(create_storage("recompute", Block(64, 4, 0.0))) is Recompute


def test_blocks_compiled_by_different_backends_share_nothing() -> None:
    x = torch.randn(4, 128, 64)
    for backend in ("aot_eager", "inductor"):
        torch.manual_seed(0)
        block = Block(64, 4, 0.2)
        block.compile(backend=backend)
        _assert_same(_step(create_storage("recompute", block), block, block, x), _step(Keep(block), block, block, x))
    assert len(variant._Compilation._all) == 2
