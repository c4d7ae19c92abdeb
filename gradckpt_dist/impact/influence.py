"""``influence``: what first-order theory says of a block's errors, from the gradients at its output and its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from gradckpt_dist.impact.norm import NormImpact, SquareSums, watched_tensors
from gradckpt_dist.storage.parts import share_of, tokens_of

SKETCH_WIDTH = 32


class InfluenceImpact(NormImpact):
    """Gathers, beside the norm, by block: the signal in its weights' gradient, and how much it changes the gradient.

    The gradient of a weight is a sum over tokens t, G = sum_t g_t x_t^T, g_t being the gradient at its output and x_t
    what was stored. Stored with an error d_t, it becomes G + sum_t g_t d_t^T. Rounding errors of different tokens are
    independent of each other and have mean 0, so that, to first order,

        E ||sum_t g_t d_t^T||^2 = sum_t ||g_t||^2 E ||d_t||^2 = e^2 sum_t ||g_t||^2 ||x_t||^2,

    e being the storage's relative error (ActNN, Chen et al. 2021, bounds the variance of compressed training alike).
    Relative to the gradient it is e^2 / c, with c = ||sum_t g_t x_t^T||^2 / sum_t ||g_t||^2 ||x_t||^2: large where
    tokens agree, about 1 where they cancel. For a block, g is the gradient at its output and x its input, each token
    scaled to norm 1.

    In a residual block the gradient passes unharmed along the skip connection. Only what the block adds, g_in - g_out,
    is made from stored tensors: the relative squared error of g_in is f^2 b with b = ||g_in - g_out||^2 / ||g_in||^2.

    e and f are found by probes, once per kind of block. x is projected to 32 random directions in forward
    (Johnson-Lindenstrauss), so that little is held for it; g_out is held while the block is in backward.
    """

    name = "influence"
    fields = 4
    """Squared norm of g_out; signal; squared norms of g_in - g_out, and of g_in."""

    def __init__(self, blocks: int, device: torch.device) -> None:
        super().__init__(blocks, device)
        self._projections: dict[tuple[int, torch.dtype, torch.device], torch.Tensor] = {}

    def watch(self, index: int, output: Any, inputs: Any = ()) -> None:
        super().watch(index, output, inputs)
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
        for leaf in watched_tensors(output):
            source = next((tensor for tensor in tensors if _alike(tensor, leaf)), None)
            tokens = None if source is None else tokens_of(source)
            passage = _Passage(self._step, index, None if tokens is None else self._sketch(tokens))
            leaf.register_hook(passage.leave)  # type: ignore[no-untyped-call]
            if source is not None and source.requires_grad and source is not leaf:
                source.register_hook(passage.arrive)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _sketch(self, source: torch.Tensor) -> torch.Tensor:
        """[tokens, SKETCH_WIDTH]; each token's expected squared norm is 1."""
        tokens = source.detach().flatten(0, -2)
        norms = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
        return (tokens @ self._projection(source)).div_(norms.clamp_min_(torch.finfo(norms.dtype).tiny))

    def _projection(self, like: torch.Tensor) -> torch.Tensor:
        key = (like.shape[-1], like.dtype, like.device)
        if key not in self._projections:
            generator = torch.Generator().manual_seed(like.shape[-1])
            signs = torch.randint(2, (like.shape[-1], SKETCH_WIDTH), generator=generator, device="cpu") * 2 - 1
            self._projections[key] = (signs / SKETCH_WIDTH**0.5).to(like.device, like.dtype)
        return self._projections[key]


def first_order(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Signal, c and b of ``InfluenceImpact``, from its gathered values [fields, ...]; c and b are 1 where unknown."""
    signal = values[min(1, len(values) - 1)]
    one = torch.ones_like(signal)
    coherence = torch.where(signal > 0, signal / values[0], one)
    if len(values) < InfluenceImpact.fields:
        return signal, coherence, one
    return signal, coherence, torch.where(values[3] > 0, values[2] / values[3], one)


def _alike(source: torch.Tensor, output: torch.Tensor) -> bool:
    """Whether a token at the input becomes the token at the same place of the output, on the same rank."""
    same_placements = getattr(source, "placements", None) == getattr(output, "placements", None)
    usable = source.is_floating_point() and not isinstance(source, nn.Parameter)
    return usable and output.dim() > 1 and source.shape == output.shape and same_placements


class _Passage:
    """One call of a block, passed by the gradient from its output to its input.

    Of DTensors, tokens that are on other ranks are left out of the sum over tokens, as data-parallel ranks leave out
    each other's.
    """

    __slots__ = ("_block", "_grad", "_sketch", "_sums")

    def __init__(self, sums: SquareSums, block: int, sketch: torch.Tensor | None) -> None:
        self._sums = sums
        self._block = block
        self._sketch = sketch
        self._grad: torch.Tensor | None = None

    @torch.no_grad()
    def leave(self, grad: torch.Tensor) -> None:
        """At the output. Without a sketch, the signal is ||g||^2."""
        sketch, self._sketch = self._sketch, None
        tokens = None if sketch is None else tokens_of(grad)
        if sketch is None or tokens is None or tokens.numel() // tokens.shape[-1] != len(sketch):
            self._sums.add(1, self._block, grad)
            return
        signal = tokens.flatten(0, -2).mT.to(sketch.dtype) @ sketch
        self._sums.add(1, self._block, signal, copies=share_of(grad)[1])
        self._grad = grad

    @torch.no_grad()
    def arrive(self, grad: torch.Tensor) -> None:
        """At the input."""
        behind, self._grad = self._grad, None
        if behind is not None and _alike(grad, behind):
            self._sums.add(2, self._block, grad - behind)
            self._sums.add(3, self._block, grad)
