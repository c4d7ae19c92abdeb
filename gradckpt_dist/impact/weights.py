"""How the squared norm of the whole gradient is shared out over blocks, and over what is outside of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gradckpt_dist.impact.norm import square


class GradientWeights:
    """Gathers ||G_j||^2 on the device, after backward in sampled steps, before the gradients are set to zero.

    Places are: parameters registered before those of all blocks (embeddings), each block, and the other parameters
    (the head). A parameter used in two places counts in the first; FSDP1's flat parameter of what is outside of blocks
    counts before them, to which errors are passed. Sharded gradients add up over ranks; of distributed
    tensors, each rank counts its part of what is replicated. Each step is divided by ``Impact.step_scale``, as a loss
    scale cancels so, and ranks that hold different shards stay comparable. Where no gradient is found (ZeRO holds them
    elsewhere), a step teaches nothing.
    """

    def __init__(self, root: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._root = root
        self._blocks = list(blocks)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._places: list[list[nn.Parameter]] = []
        self._window = torch.zeros(len(blocks) + 3, dtype=dtype, device=device)

    @torch.no_grad()
    def gather(self, scale: torch.Tensor) -> None:
        """Look at the gradients as they are now, once in a step, whose ``Impact.step_scale`` this is."""
        if not self._places:
            self._places = self._find_places()
        squares = torch.stack([self._squares(parameters) for parameters in self._places])
        total = squares.sum() / scale
        usable = torch.isfinite(total) & (total > 0)
        self._window[:-1] += torch.where(usable, squares / scale, 0.0)
        self._window[-1] += usable

    def take_window(self) -> torch.Tensor:
        """Float64 [blocks + 3]: sums over steps (before, by block, after), steps counted; then start anew."""
        window = self._window.clone()
        self._window.zero_()
        self._places = []
        return window

    def _squares(self, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        whole = [grad for grad in gradients if type(grad) is torch.Tensor]
        total = torch.zeros((), dtype=self._window.dtype, device=self._window.device)
        for grad in gradients:
            if type(grad) is not torch.Tensor:
                total += _own_square(grad, total)
        if whole:
            precision = torch.promote_types(whole[0].dtype, torch.float32)
            norms = torch._foreach_norm(whole, dtype=precision)
            total += torch.stack([norm.to(total.device, total.dtype) for norm in norms]).square().sum()
        return total

    def _find_places(self) -> list[list[nn.Parameter]]:
        of_blocks = [list(block.parameters()) for block in self._blocks]
        owned = {id(parameter) for parameters in of_blocks for parameter in parameters}
        before: list[nn.Parameter] = []
        after: list[nn.Parameter] = []
        side = before
        for parameter in self._root.parameters():
            if id(parameter) in owned:
                side = after
            else:
                side.append(parameter)
        return [before, *of_blocks, after]


def _own_square(grad: Any, like: torch.Tensor) -> torch.Tensor:
    local = getattr(grad, "_local_tensor", grad)
    copies = 1
    for dimension, placement in enumerate(getattr(grad, "placements", ())):
        if placement.is_replicate():
            copies *= grad.device_mesh.size(dimension)
    return square(local, like) / copies
