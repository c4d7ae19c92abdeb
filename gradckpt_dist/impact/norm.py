"""``norm``: the gradient norm at the block's output, the source's I_i."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from gradckpt_dist.impact.base import Impact


class NormImpact(Impact):
    """I_i = ||g_i||, g_i the gradient at all outputs of block i, relative to the step's mean over blocks.

    Each step's squares are divided by their mean, so a loss scale cancels; within a step, micro-batches and repeated
    calls of a block add up.
    """

    name = "norm"

    def __init__(self, blocks: int, device: torch.device) -> None:
        super().__init__(blocks, device)
        # MPS has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._step = torch.zeros(blocks, dtype=dtype, device=device)
        self._window = torch.zeros(blocks + 2, dtype=dtype, device=device)

    def watch(self, index: int, output: Any) -> None:
        tensors = {id(leaf): leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)}
        for leaf in tensors.values():
            # A hook on a parameter that a block hands out would outlive the step.
            if leaf.requires_grad and not isinstance(leaf, nn.Parameter):
                leaf.register_hook(_AddSquare(self._step[index]))  # type: ignore[no-untyped-call]

    def end_step(self) -> None:
        mean = self._step.mean()
        usable = torch.isfinite(self._step).all() & (mean > 0)
        share = torch.where(usable, self._step / mean, 0.0)
        self._window[: self.blocks] += torch.nan_to_num(share, nan=0.0, posinf=0.0)
        self._window[self.blocks] += usable
        self._window[self.blocks + 1] += ~usable
        self._step.zero_()

    def take_window(self) -> torch.Tensor:
        window = self._window.clone()
        self._window.zero_()
        return window


class _AddSquare:
    """Adds a gradient's squared norm into one cell. Leaves the gradient as it is."""

    __slots__ = ("_cell",)

    def __init__(self, cell: torch.Tensor) -> None:
        self._cell = cell

    @torch.no_grad()
    def __call__(self, grad: torch.Tensor) -> None:
        norm = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
        self._cell.add_(norm.to(self._cell.device, self._cell.dtype).square_())
