"""Twins are blocks of one structure."""

from __future__ import annotations

from torch import nn

from gradckpt_dist.cost.kind import kinds_of


class _Wide(nn.Module):
    def __init__(self, width: int, heads: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(width, width).weight.detach())
        self.norm = nn.LayerNorm(width)
        self.heads = heads


def test_class_structure_and_shapes_count() -> None:
    frozen = _Wide(4).requires_grad_(False)
    blocks = [_Wide(4), nn.Linear(4, 4), _Wide(8), _Wide(4), nn.Linear(4, 4, bias=False), frozen, nn.Linear(4, 4)]
    assert kinds_of(blocks) == (0, 1, 2, 0, 3, 4, 1)
    assert kinds_of([nn.Sequential(nn.Dropout(0.1)), nn.Sequential(nn.Dropout(0.2))]) == (0, 1)


def test_a_compiled_block_is_of_another_kind() -> None:
    blocks = [nn.Linear(4, 4), nn.Linear(4, 4)]
    blocks[1].compile()
    assert kinds_of(blocks) == (0, 1)
