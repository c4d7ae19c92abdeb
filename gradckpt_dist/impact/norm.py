"""``norm``: the gradient norm at the block's output, the source's I_i."""

from __future__ import annotations

import math
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
        self._step = SquareSums(self.fields, blocks, device)
        self._window = torch.zeros(self.fields * blocks + 2, dtype=accurate(device), device=device)

    def watch(self, index: int, output: Any, inputs: Any = ()) -> None:
        for leaf in watched_tensors(output):
            leaf.register_hook(_AddSquare(self._step, index))  # type: ignore[no-untyped-call]

    def step_scale(self) -> torch.Tensor:
        return self._step.values()[0].mean()

    def step_values(self) -> torch.Tensor:
        values = self._step.values()
        mean = values[0].mean()
        usable = torch.isfinite(values).all() & (mean > 0)
        return torch.where(usable, values / mean, torch.nan)

    def spoil(self) -> None:
        self._step.fill(math.nan)

    def end_step(self) -> None:
        values = self.step_values().flatten()
        usable = torch.isfinite(values).all()
        self._window[:-2] += torch.where(usable, values, 0.0)
        self._window[-2] += usable
        self._window[-1] += ~usable
        self._step.fill(0.0)

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
    return _norm(tensor).to(like.device, like.dtype).square_()


def accurate(device: torch.device) -> torch.dtype:
    """Float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


class SquareSums:
    """Squared norms, added up in cells [fields, blocks] on the device: all at once, when they are asked for."""

    def __init__(self, fields: int, blocks: int, device: torch.device) -> None:
        self._sums = torch.zeros(fields * blocks, dtype=accurate(device), device=device)
        self._blocks = blocks
        self._found: list[tuple[int, torch.Tensor]] = []
        self._cells: tuple[tuple[int, ...], torch.Tensor] = (), torch.empty(0, device=device)

    def add(self, field: int, block: int, tensor: torch.Tensor, copies: int = 1) -> None:
        """The squared norm of a tensor, or of a DTensor this rank's share; a share of it for each of ``copies``."""
        self._found.append((field * self._blocks + block, _norm(tensor, copies)))

    def values(self) -> torch.Tensor:
        """[fields, blocks]; not a copy."""
        if self._found:
            cells, norms = zip(*self._found, strict=True)
            self._found.clear()
            squares = torch.stack([norm.to(self._sums.device) for norm in norms]).to(self._sums.dtype).square_()
            self._sums.index_add_(0, self._index(cells), squares)
        return self._sums.view(-1, self._blocks)

    def fill(self, value: float) -> None:
        """Set every cell."""
        self._found.clear()
        self._sums.fill_(value)

    def _index(self, cells: tuple[int, ...]) -> torch.Tensor:
        if cells != self._cells[0]:  # the same from step to step
            self._cells = cells, torch.tensor(cells, device="cpu").to(self._sums.device, non_blocking=True)
        return self._cells[1]


def _norm(tensor: torch.Tensor, copies: int = 1) -> torch.Tensor:
    part, alike = share_of(tensor)
    copies *= alike
    norm: torch.Tensor = torch.linalg.vector_norm(part, dtype=torch.promote_types(part.dtype, torch.float32))
    return norm if copies == 1 else norm / copies**0.5


class _AddSquare:
    """Adds a gradient's squared norm to those of one block. Leaves the gradient as it is."""

    __slots__ = ("_block", "_sums")

    def __init__(self, sums: SquareSums, block: int) -> None:
        self._sums = sums
        self._block = block

    @torch.no_grad()
    def __call__(self, grad: torch.Tensor) -> None:
        self._sums.add(0, self._block, grad)
