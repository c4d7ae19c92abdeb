"""A sampled step without an engine: the switch, the sampler and a prober on a model's blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gradckpt_dist.blocks import BlockSwitch, find_blocks
from gradckpt_dist.cost.agreed import Costs
from gradckpt_dist.cost.book import CostBook
from gradckpt_dist.cost.clock import DeviceClock
from gradckpt_dist.cost.kind import kinds_of
from gradckpt_dist.impact import create_impact
from gradckpt_dist.impact.expected import ExpectedErrors
from gradckpt_dist.impact.probe import ProbeStatistics
from gradckpt_dist.memory import memory_meter
from gradckpt_dist.peaks import StepPeaks
from gradckpt_dist.probing import Prober, ProbeTurn
from gradckpt_dist.runtime import BlockRuntime, Gate
from gradckpt_dist.sampling import Sampler
from gradckpt_dist.storage import STORAGES, Storage

CPU = torch.device("cpu")


class Coarse(Storage):
    """Lossy: every saved activation is rounded to bfloat16."""

    name = "compress4"
    exact = False
    reruns = False

    def run(self, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        from gradckpt_dist.storage.ledger import is_parameter

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if is_parameter(tensor) or not tensor.is_floating_point():
                return tensor
            return tensor.to(torch.bfloat16).to(tensor.dtype)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return forward(*args, **kwargs)


@contextmanager
def coarse_storage() -> Iterator[None]:
    """``compress4`` is ``Coarse``."""
    before = STORAGES.get("compress4")
    STORAGES["compress4"] = Coarse
    try:
        yield
    finally:
        if before is None:
            del STORAGES["compress4"]
        else:
            STORAGES["compress4"] = before


class Probed:
    """A model whose blocks are switched; every forward between ``begin`` and ``end`` is of a sampled step."""

    def __init__(
        self,
        model: nn.Module,
        storages: Sequence[str],
        lossy: Sequence[str] = (),
        metric: str = "probe",
        blocks: Sequence[str] = (),
    ) -> None:
        self.model = model
        found = find_blocks(model, blocks)
        modules = [block.module for block in found]
        self.lossy, self.storages = tuple(lossy), tuple(storages)
        self.kinds = kinds_of(modules)
        self.gate = Gate()
        self.runtimes = [BlockRuntime(i, module, self.gate) for i, module in enumerate(modules)]
        self.switches = [BlockSwitch(block, run) for block, run in zip(found, self.runtimes, strict=True)]
        for switch in self.switches:
            switch.install()
        clock = DeviceClock(CPU)
        self.impact = create_impact(metric, len(found), CPU)
        self.book = CostBook(self.kinds, storages, clock)
        self.costs = Costs(self.kinds, storages)
        self.statistics = ProbeStatistics(len(found), self.lossy, CPU)
        self.expected = ExpectedErrors(self.kinds, self.lossy)
        self.prober = Prober(modules, self.book, self.statistics, clock)
        self.sampler = Sampler(self.impact, StepPeaks(memory_meter(CPU)), self.prober)
        root = model
        self._handles = [
            root.register_forward_pre_hook(self._open, prepend=True),
            root.register_forward_hook(self._close, always_call=True),
        ]

    def use(self, storage: str) -> None:
        for runtime in self.runtimes:
            runtime.use(storage)

    def begin(self, block: int, *storages: str, rounds: int = 1, measured: bool = False) -> None:
        turn = ProbeTurn(block=block, storages=storages or self.storages, rounds=rounds)
        self.sampler.begin(measured=measured, turns=[turn])
        self.gate.watch = self.sampler

    def end(self) -> Any:
        self.gate.watch = None
        return self.sampler.end()

    def agree(self) -> list[float]:
        """Fold this window in, as one rank would; the impact's running values."""
        values, sums = self.take()
        self.expected.update(sums)
        self.costs.update(self.book.take_maxima())
        return values

    def take(self) -> tuple[list[float], list[float]]:
        """The impact's running values, and the sums of the probes."""
        *values, count, _ = self.impact.take_window().tolist()
        return [value / count for value in values], self.statistics.take_window().tolist()

    def undo(self) -> None:
        for handle in self._handles:
            handle.remove()
        for switch in self.switches:
            switch.undo()

    def _open(self, *_: Any) -> None:
        self.gate.open = True
        if self.gate.watch is not None:
            self.sampler.begin_forward()

    def _close(self, *_: Any) -> None:
        self.gate.open = False
        if self.gate.watch is not None:
            self.sampler.end_forward()
