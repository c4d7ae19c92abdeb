"""The uneven model has the kinds of block that it promises, and its blocks are found."""

from __future__ import annotations

import torch
from torch import nn

from gradckpt_dist.bench.frontier.models import Workload
from gradckpt_dist.bench.frontier.setting import Size
from gradckpt_dist.blocks import find_blocks

SIZE = Size(width=32, context=16, batch=2, layers=2, head_width=8)


def test_uneven_blocks() -> None:
    work = Workload("uneven", SIZE)
    assert [block.name for block in find_blocks(work.model)] == [f"blocks.{index}" for index in range(12)]
    kinds = []
    for block in work.blocks:
        attention, mlp = block.attention, block.mlp
        assert isinstance(attention, nn.ModuleList)
        assert isinstance(mlp, nn.ModuleList)
        kinds.append((attention[2].in_features if len(attention) else 0, mlp[1].out_features if len(mlp) else 0))
    assert kinds == [(32, 128), (16, 16), (32, 0), (0, 64), (16, 16), (32, 0)] * 2


def test_a_workload_is_the_same_each_time() -> None:
    for model in ("demo", "uneven"):
        first, second = Workload(model, SIZE), Workload(model, SIZE)
        gradients = first.gradients()
        for again in (first.gradients(), second.gradients()):
            assert all(torch.equal(one, other) for one, other in zip(gradients, again, strict=True))
        assert all(gradient.any() for gradient in gradients)
