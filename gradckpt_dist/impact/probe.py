"""``probe``: the error of a block's gradients, measured with what each storage holds against what ``keep`` holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradckpt_dist.impact.influence import InfluenceImpact, first_order
from gradckpt_dist.impact.norm import accurate, square

Gradients = tuple[Sequence[torch.Tensor | None], Sequence[torch.Tensor | None]]
"""Of a block's parameters, and of its inputs."""


class ProbeImpact(InfluenceImpact):
    """Gathers what ``influence`` does, which carries a block's last probe on to the steps after it."""

    name = "probe"


class ProbeStatistics:
    """Sums of what probes have measured, on the device and without a synchronisation.

    A probe of block i gives, relative to the gradients under ``keep`` from the same upstream gradient, the squared
    error of its own parameters' gradients (``own``) and of its inputs' (``passed``) under each lossy storage.
    A probe with a non-finite value is dropped and counted. Parameters outside of blocks are left out.
    """

    def __init__(self, blocks: int, lossy: Sequence[str], device: torch.device) -> None:
        self.blocks = blocks
        self.lossy = tuple(lossy)
        self._window = torch.zeros(blocks * block_fields(len(lossy)) + 1, dtype=accurate(device), device=device)
        self._step: list[tuple[int, str, torch.Tensor, torch.Tensor]] = []

    @torch.no_grad()
    def add(self, index: int, storage: str, reference: Gradients, stored: Gradients) -> None:
        """A probe of the block at ``index``: gradients under ``keep``, and under this lossy storage."""
        own, passed = (_squares(gradients, self._window) for gradients in reference)
        pairs = zip(stored, reference, (own, passed), strict=True)
        errors = [_ratio(_squared_distance(one, other, self._window), whole) for one, other, whole in pairs]
        self._step.append((index, storage, own, torch.stack(errors)))

    @torch.no_grad()
    def end_step(self, scale: torch.Tensor, values: torch.Tensor) -> None:
        """Close a sampled step, with ``Impact.step_scale`` and ``Impact.step_values`` of it."""
        for index, storage, own, errors in self._step:
            row = self._row(index, storage, own / scale, values, errors)
            usable = torch.isfinite(row).all()
            width = block_fields(len(self.lossy))
            self._window[index * width : (index + 1) * width] += torch.where(usable, row, 0.0)
            self._window[-1] += ~usable
        self._step = []

    def take_window(self) -> torch.Tensor:
        """Float64 [blocks x (3 + 5 x lossy) + 1]: sums by block, and probes dropped; then start anew."""
        window = self._window.clone()
        self._window.zero_()
        return window

    def _row(
        self, index: int, storage: str, weight: torch.Tensor, values: torch.Tensor, errors: torch.Tensor
    ) -> torch.Tensor:
        one = torch.ones_like(weight)
        signal, coherence, branch = first_order(values[:, index])
        row = [one, weight, weight / signal]
        for name in self.lossy:
            own, passed = errors
            found = [one, own, passed, own * coherence, _ratio(passed, branch)]
            row += found if name == storage else [torch.zeros_like(one)] * len(found)
        return torch.stack(row)


def block_fields(lossy: int) -> int:
    """Numbers per block in a window: probes, gradient, gradient / signal; by storage, see ``ProbeStatistics._row``."""
    return 3 + 5 * lossy


def _squares(tensors: Sequence[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=like.dtype, device=like.device)
    for tensor in tensors:
        if tensor is not None:
            total += square(tensor, like)
    return total


def _squared_distance(
    ones: Sequence[torch.Tensor | None], others: Sequence[torch.Tensor | None], like: torch.Tensor
) -> torch.Tensor:
    pairs = zip(ones, others, strict=True)
    return _squares([one - other for one, other in pairs if one is not None and other is not None], like)


def _ratio(error: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """0 where there is nothing to be wrong; not finite where the gradient is not."""
    return torch.where(whole == 0, torch.zeros_like(whole), error / whole)
