"""Lossy storages: what is refused, and nothing left behind."""

from __future__ import annotations

import gc

import pytest
import torch
from compress_support import LOSSY, ROWS, SIZE, WIDTH, codes_bytes, leaf, transformer
from models import Function
from storage_support import changed_between_saves, gradients, live_bytes, run, storages
from torch import Tensor, nn
from torch.nn import functional

from gradckpt_dist import StorageError
from gradckpt_dist.storage import create_storage, deferred
from gradckpt_dist.storage.quantiser import Quantised, dequantise

# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSY)
def test_double_backward_is_refused(name: str) -> None:
    blocks = transformer(1)
    with pytest.raises(StorageError, match=r"create_graph=True\).*use an exact storage"):
        gradients(storages(name, blocks), torch.randn(4, 64, 64), create_graph=True)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch.func.jvp's own
def test_functional_transforms_are_refused(name: str, transform: str) -> None:
    block = nn.Linear(WIDTH, WIDTH)
    storage = create_storage(name, block)
    x = torch.randn(ROWS, WIDTH)

    def call(x: Tensor) -> Tensor:
        return storage.run(block, x).sum()

    with pytest.raises(StorageError, match=r"torch\.func transforms.*use another storage"):
        if transform == "grad":
            torch.func.grad(call)(x)
        elif transform == "vmap":
            torch.func.vmap(call)(x)
        else:
            torch.func.jvp(call, (x,), (x,))


@pytest.mark.parametrize("name", LOSSY)
def test_a_change_after_saving_is_an_error(name: str) -> None:
    block = Function(lambda x: x.exp())
    for shape in ((ROWS, WIDTH), (4,)):
        storage = create_storage(name, block)
        output = storage.run(block, leaf(*shape))
        output.add_(1)
        with pytest.raises(
            RuntimeError, match=r"modified by an inplace operation.*is at version 1, expected version 0"
        ):
            output.sum().backward()


@pytest.mark.parametrize("name", LOSSY)
def test_a_change_inside_the_block_is_an_error(name: str) -> None:
    block = Function(lambda x: x.exp().add_(1))
    storage = create_storage(name, block)
    output = storage.run(block, leaf())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_storage_changed_between_two_saves_is_held_twice() -> None:
    x = leaf()
    block = Function(changed_between_saves)
    storage = create_storage("compress8", block)
    (gradient,) = torch.autograd.grad(storage.run(block, x).sum(), x)
    assert (gradient - x.detach() - 1).abs().max() < 0.02


# -- nothing stays ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSY)
def test_nothing_stays_after_forward_alone_or_backward(name: str) -> None:
    blocks = transformer()
    kinds = storages(name, blocks)
    x = torch.randn(4, 64, 64, requires_grad=True)
    output = run(kinds, x)
    del output
    before = live_bytes()
    output = run(kinds, x)
    assert sum(storage.held_bytes for storage in kinds) > 0
    del output
    assert [storage.held_bytes for storage in kinds] == [0, 0]
    assert live_bytes() == before
    torch.autograd.grad(run(kinds, x).sum(), x)
    assert [storage.held_bytes for storage in kinds] == [0, 0]
    assert live_bytes() == before


@pytest.mark.parametrize("name", LOSSY)
def test_an_output_that_is_saved_does_not_keep_itself_alive(name: str) -> None:
    block = Function(lambda x: (x[:4, :4].exp(), x.exp()))
    storage = create_storage(name, block)
    gc.disable()
    try:
        outputs = storage.run(block, leaf())
        assert storage.held_bytes > 0
        del outputs
        assert storage.held_bytes == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("name", LOSSY)
def test_nothing_stays_after_an_exception(name: str) -> None:
    def fail(x: Tensor) -> Tensor:
        x = x.exp().sigmoid()
        raise ValueError(f"shape {tuple(x.shape)}")

    block = Function(fail)
    storage = create_storage(name, block)
    with pytest.raises(ValueError, match="shape"):
        storage.run(block, leaf())
    gc.collect()
    assert storage.held_bytes == 0


def test_what_is_freed_during_forward_is_not_kept_until_its_end() -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        torch.autograd.grad(x.exp().sum(), x)  # saves, restores and frees
        seen.append(storage.held_bytes)
        return x * 2

    block = Function(function)
    storage = create_storage("compress8", block)
    with torch.no_grad():
        x = leaf()
    with torch.enable_grad():
        try:
            storage.run(block, x)
        finally:
            assert seen == [0]


def test_what_the_forward_is_done_with_is_coded_before_its_end() -> None:
    seen = []

    def function(x: Tensor, kept: list[Tensor]) -> Tensor:
        for _ in range(3):
            x = x.exp()
            kept.append(x)
            x = -x
            seen.append(storage.held_bytes)
        return x

    class Forgetful(list[Tensor]):
        def append(self, item: Tensor) -> None: ...

    block = Function(function)
    storage = create_storage("compress8", block)
    coded = codes_bytes(ROWS * WIDTH, 8)
    storage.run(block, leaf(), Forgetful())
    assert seen == [SIZE, SIZE + coded, SIZE + 2 * coded]
    # What is still in use waits for the end.
    seen.clear()
    kept: list[Tensor] = []
    output = storage.run(block, leaf(), kept)
    assert seen == [SIZE, 2 * SIZE, 3 * SIZE]
    assert storage.held_bytes == 3 * coded
    assert len(kept) == 3
    assert output.requires_grad


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of all that is made from codes."""
    shapes = []

    def noting(quantised: Quantised) -> Tensor:
        shapes.append(quantised.shape)
        return dequantise(quantised)

    monkeypatch.setattr(deferred, "dequantise", noting)
    return shapes


def test_what_several_nodes_have_saved_is_decoded_once(decoded: list[torch.Size]) -> None:
    weights = [torch.randn(WIDTH, WIDTH, requires_grad=True) for _ in range(3)]

    def function(x: Tensor) -> Tensor:
        x = x.exp()
        return torch.stack([functional.linear(x, weight) for weight in weights])

    block = Function(function)
    create_storage("compress8", block).run(block, leaf()).sum().backward()
    assert len(decoded) == 1


def test_a_block_may_hold_what_later_ones_have_let_go_of(decoded: list[torch.Size]) -> None:
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)) for _ in range(8)]
    kinds = storages("compress8", blocks)
    run(kinds, leaf()).sum().backward()
    # Each decodes its input once; what GELU was given once, or twice where there is no room until GELU asks for it.
    without_room = -(-SIZE // (2 * codes_bytes(ROWS * WIDTH, 8)))
    assert without_room == 2
    assert len(decoded) == 2 * len(blocks) + without_room
    assert kinds[0].account.slack.held_bytes == 0


@pytest.mark.parametrize("name", LOSSY)
def test_a_retained_graph_can_be_used_again(name: str) -> None:
    kinds = storages(name, transformer())
    x = torch.randn(4, 64, 64, requires_grad=True)
    loss = run(kinds, x).square().mean()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)
    del loss
    assert [storage.held_bytes for storage in kinds] == [0, 0]
