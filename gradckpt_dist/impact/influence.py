"""``influence``: how much of a block's gradient is left after the sum over tokens, which errors do not share in."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from gradckpt_dist.impact.norm import NormImpact, square, watched_tensors

SKETCH_WIDTH = 32


class InfluenceImpact(NormImpact):
    """Gathers, beside the norm, the strength of the signal in the gradient of a block's weights.

    The gradient of a weight is a sum over tokens t, G = sum_t g_t x_t^T, g_t being the gradient at its output and x_t
    what was stored. Stored with an error d_t, it becomes G + sum_t g_t d_t^T. Rounding errors of different tokens are
    independent of each other and have mean 0, so that, to first order,

        E ||sum_t g_t d_t^T||^2 = sum_t ||g_t||^2 E ||d_t||^2 = e^2 sum_t ||g_t||^2 ||x_t||^2,

    e being the storage's relative error (ActNN, Chen et al. 2021, bounds the variance of compressed training alike).
    The signal ||G||^2 shrinks where the tokens' gradients cancel, the error does not: relative to the gradient it is
    e^2 / c, with the coherence c = ||sum_t g_t x_t^T||^2 / sum_t ||g_t||^2 ||x_t||^2. For a block, g is the gradient
    at its output and x its input, each token scaled to norm 1; e is found by probes, once per kind of block.

    x is projected to 32 random directions in forward (Johnson-Lindenstrauss), so that little is held for it.
    """

    name = "influence"
    fields = 2

    def __init__(self, blocks: int, device: torch.device) -> None:
        super().__init__(blocks, device)
        self._projections: dict[tuple[int, torch.dtype, torch.device], torch.Tensor] = {}

    def watch(self, index: int, output: Any, inputs: Any = ()) -> None:
        super().watch(index, output, inputs)
        # Of distributed tensors only norms are taken.
        tensors = [leaf for leaf in tree_leaves(inputs) if type(leaf) is torch.Tensor and leaf.is_floating_point()]
        for leaf in watched_tensors(output):
            alike = (tensor for tensor in tensors if tensor.shape[:-1] == leaf.shape[:-1] and leaf.dim() > 1)
            source = next(alike, None)
            sketch = None if source is None else self._sketch(source)
            leaf.register_hook(_AddSignal(self._step[1, index], sketch))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _sketch(self, source: torch.Tensor) -> torch.Tensor:
        """[tokens, SKETCH_WIDTH]; each token's expected squared norm is 1."""
        tokens = torch.nn.functional.normalize(source.detach().flatten(0, -2), dim=-1)
        return tokens @ self._projection(source)

    def _projection(self, like: torch.Tensor) -> torch.Tensor:
        key = (like.shape[-1], like.dtype, like.device)
        if key not in self._projections:
            generator = torch.Generator().manual_seed(like.shape[-1])
            signs = torch.randint(2, (like.shape[-1], SKETCH_WIDTH), generator=generator) * 2 - 1
            self._projections[key] = (signs / SKETCH_WIDTH**0.5).to(like.device, like.dtype)
        return self._projections[key]


class _AddSignal:
    """Adds ||sum_t g_t s_t^T||^2 into one cell; without a sketch, ||g||^2, as if all tokens agreed."""

    __slots__ = ("_cell", "_sketch")

    def __init__(self, cell: torch.Tensor, sketch: torch.Tensor | None) -> None:
        self._cell = cell
        self._sketch = sketch

    @torch.no_grad()
    def __call__(self, grad: torch.Tensor) -> None:
        if self._sketch is None or type(grad) is not torch.Tensor:
            self._cell.add_(square(grad, self._cell))
            return
        sketch, self._sketch = self._sketch, None
        signal = grad.flatten(0, -2).mT.to(sketch.dtype) @ sketch
        self._cell.add_(square(signal, self._cell))
