"""Which buffers are copied, and when."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradckpt_dist.storage.buffers import BufferGuard


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("constant", torch.ones(2))
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.constant


X = torch.tensor([[1.0, 2.0], [3.0, 5.0]])


def _forward(guard: BufferGuard, block: nn.Module) -> dict[str, Tensor]:
    """The copies that a forward leaves for its rerun, by the buffer's name."""
    snapshot, versions = guard.snapshot(), guard.versions()
    block(X)
    guard.settle(versions, snapshot)
    return {name: value for (_, name), value in snapshot.items()}


def test_the_first_forward_shows_which_buffers_change() -> None:
    block = Block()
    guard = BufferGuard(block)
    assert {name for _, name in guard.snapshot()} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
        "constant",
    }
    for batches in range(3):
        copies = _forward(guard, block)
        assert set(copies) == {"running_mean", "running_var", "num_batches_tracked"}
        assert copies["num_batches_tracked"] == batches
        assert block.norm.num_batches_tracked == batches + 1


def test_a_block_whose_buffers_never_change_copies_nothing() -> None:
    for block in (nn.Linear(2, 2), Block().eval()):
        guard = BufferGuard(block)
        _forward(guard, block)
        assert guard.snapshot() == {}
        assert guard.versions() == ()


def test_a_change_of_mode_looks_again() -> None:
    block = Block().eval()
    guard = BufferGuard(block)
    assert _forward(guard, block) == {}
    block.train()
    assert len(_forward(guard, block)) == 3
    block.eval()
    assert _forward(guard, block) == {}


def test_substituted_buffers_take_the_changes_of_a_rerun() -> None:
    block = Block()
    guard = BufferGuard(block)
    snapshot, versions = guard.snapshot(), guard.versions()
    block(X)
    guard.settle(versions, snapshot)
    originals = dict(block.norm._buffers)
    after = {name: value.clone() for name, value in originals.items() if value is not None}
    for _ in range(2):
        with guard.substituted(snapshot):
            assert block.norm.num_batches_tracked == 0
            block(X)
            assert all(torch.equal(value, after[name]) for name, value in block.norm.named_buffers())
    for name, value in block.norm._buffers.items():
        assert value is originals[name]
        assert torch.equal(value, after[name])
