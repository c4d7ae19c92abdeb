"""``norm``: the gradient norm at the block's output, the source's I_i."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from gradckpt_dist.impact.base import Impact
from gradckpt_dist.storage.parts import share_of


class NormImpact(Impact):
    """I_i = ||g_i||, g_i the gradient at all outputs of block i, relative to the step's mean over blocks.

    Each step's squares are divided by their mean, so a loss scale cancels; within a step, micro-batches and repeated
    calls of a block add up. Of a DTensor, each rank counts its part: shards add up over ranks, and of what several
    ranks hold alike each takes an equal share. Of plain tensors, each rank counts what it has; ranks that hold the
    same, and ranks that hold shards (sequence parallelism with local outputs), weigh alike in the mean.
    """

    name = "norm"

    def __init__(self, blocks: int, device: torch.device) -> None:
        super().__init__(blocks, device)
        # MPS has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._step = torch.zeros(self.fields, blocks, dtype=dtype, device=device)
        self._window = torch.zeros(self.fields * blocks + 2, dtype=dtype, device=device)

    def watch(self, index: int, output: Any, inputs: Any = ()) -> None:
        for leaf in watched_tensors(output):
            leaf.register_hook(_AddSquare(self._step[0, index]))  # type: ignore[no-untyped-call]

    def step_scale(self) -> torch.Tensor:
        return self._step[0].mean()

    def step_values(self) -> torch.Tensor:
        mean = self.step_scale()
        usable = torch.isfinite(self._step).all() & (mean > 0)
        return torch.where(usable, self._step / mean, torch.nan)

    def spoil(self) -> None:
        self._step.fill_(torch.nan)

    def end_step(self) -> None:
        values = self.step_values().flatten()
        usable = torch.isfinite(values).all()
        self._window[:-2] += torch.where(usable, values, 0.0)
        self._window[-2] += usable
        self._window[-1] += ~usable
        self._step.zero_()

    def take_window(self) -> torch.Tensor:
        window = self._window.clone()
        self._window.zero_()
        return window


def watched_tensors(output: Any) -> list[torch.Tensor]:
    """The tensors in a block's output that a gradient will come to, each once."""
    tensors = {id(leaf): leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)}
    # A hook on a parameter that a block hands out would outlive the step.
    return [leaf for leaf in tensors.values() if leaf.requires_grad and not isinstance(leaf, nn.Parameter)]


def square(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Squared norm, computed in at least single precision, with the dtype and on the device of ``like``.

    Of a DTensor this rank's share: summed over the ranks of its mesh, it is the squared norm of the whole.
    """
    part, copies = share_of(tensor)
    norm = torch.linalg.vector_norm(part, dtype=torch.promote_types(part.dtype, torch.float32))
    squared: torch.Tensor = norm.to(like.device, like.dtype).square_()
    return squared if copies == 1 else squared / copies


class _AddSquare:
    """Adds a gradient's squared norm into one cell. Leaves the gradient as it is."""

    __slots__ = ("_cell",)

    def __init__(self, cell: torch.Tensor) -> None:
        self._cell = cell

    @torch.no_grad()
    def __call__(self, grad: torch.Tensor) -> None:
        self._cell.add_(square(grad, self._cell))
