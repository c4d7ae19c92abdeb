"""How the squared norm of the whole gradient is shared out over blocks, and over what is outside of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gradckpt_dist.impact.norm import accurate, square


class GradientWeights:
    """Gathers ||G_j||^2 on the device, after backward and before the gradients are set to zero.

    Places are: parameters registered before those of all blocks (embeddings), each block, and the other parameters
    (the head). A parameter used in two places counts in the first; FSDP1's flat parameter of what is outside of blocks
    counts before them, to which errors are passed. Sharded gradients add up over ranks; of what several ranks hold
    alike, each counts its share: of DTensors by their placements, and of plain gradients beside DTensors by the largest
    mesh of these. Each step is divided by ``Impact.step_scale``, as a loss scale cancels so, and ranks that hold
    different shards stay comparable. Where no gradient is found (ZeRO holds them elsewhere), a step teaches nothing.
    """

    def __init__(self, root: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._root = root
        self._blocks = list(blocks)
        self._places: list[list[nn.Parameter]] = []
        self._mesh_size = 1
        self._window = torch.zeros(len(blocks) + 3, dtype=accurate(device), device=device)

    @torch.no_grad()
    def gather(self, scale: torch.Tensor) -> None:
        """Look at the gradients as they are now, once in a step, whose ``Impact.step_scale`` this is."""
        if not self._places:
            self._places = self._find_places()
            self._mesh_size = max(map(_mesh_size, self._root.parameters()), default=1)
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
                # A smaller mesh is there several times among as many ranks.
                total += square(grad, total) * (_mesh_size(grad) / self._mesh_size)
        if whole:
            precision = torch.promote_types(whole[0].dtype, torch.float32)
            norms = torch._foreach_norm(whole, dtype=precision)
            alike = torch.stack([norm.to(total.device, total.dtype) for norm in norms]).square().sum()
            total += alike / self._mesh_size
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


def _mesh_size(tensor: torch.Tensor) -> int:
    mesh: Any = getattr(tensor, "device_mesh", None)
    return 1 if mesh is None else int(mesh.size())
