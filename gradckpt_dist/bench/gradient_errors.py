"""What storages truly do to a model's gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradckpt_dist.blocks import BlockSwitch, find_blocks
from gradckpt_dist.runtime import BlockRuntime, Gate
from gradckpt_dist.storage.noise import NoiseSource

Loss = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A batch, and the seed that its dropout starts from."""

    batch: Tensor
    seed: int


class GradientErrors:
    """Compares the gradients of ``twin`` under storages with its exact ones, on the same batch with the same dropout.

    ``twin`` is a model of its own, so that the one in training notices nothing; PyTorch's random state stays as it is.
    ``noise_seed`` starts the rounding of the lossy storages.
    """

    def __init__(self, twin: nn.Module, loss: Loss, noise_seed: int = 1) -> None:
        self._twin = twin
        self._loss = loss
        self._parameters = [parameter for parameter in twin.parameters() if parameter.requires_grad]
        blocks = find_blocks(twin)
        gate = Gate()
        gate.open = True
        gate.context.noise = NoiseSource(noise_seed)
        self._runtimes = [BlockRuntime(index, block.module, gate) for index, block in enumerate(blocks)]
        for block, runtime in zip(blocks, self._runtimes, strict=True):
            BlockSwitch(block, runtime).install()

    @property
    def blocks(self) -> int:
        return len(self._runtimes)

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the weights of the model in training, from its ``state_dict``."""
        self._twin.load_state_dict(state)

    def exact(self, sample: Sample) -> list[Tensor]:
        """The gradients under ``keep``."""
        return self.gradients(("keep",) * self.blocks, sample)

    def gradients(self, storages: Sequence[str], sample: Sample) -> list[Tensor]:
        """The gradients under these storages, one per block."""
        for runtime, storage in zip(self._runtimes, storages, strict=True):
            runtime.use(storage)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sample.seed)
            loss = self._loss(self._twin, sample.batch)
        return list(torch.autograd.grad(loss, self._parameters))

    def squared_error(self, storages: Sequence[str], sample: Sample, exact: Sequence[Tensor]) -> float:
        """||G' - G||^2 / ||G||^2 of one draw; ``exact`` are the gradients G of this sample."""
        pairs = list(zip(self.gradients(storages, sample), exact, strict=True))
        distance = sum((one - other).double().square().sum().item() for one, other in pairs)
        return distance / sum(other.double().square().sum().item() for _, other in pairs)

    def alone(self, index: int, storage: str) -> tuple[str, ...]:
        """The storages under which this block alone is stored so."""
        return tuple(storage if block == index else "keep" for block in range(self.blocks))
