"""What one rank gathers between two decisions, as the two vectors that travel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from gradckpt_dist.agreement.rows import SparseRows
from gradckpt_dist.cost.agreed import Costs
from gradckpt_dist.cost.book import CostBook
from gradckpt_dist.cost.clock import DeviceClock
from gradckpt_dist.impact import create_impact
from gradckpt_dist.impact.probe import ProbeStatistics, block_fields
from gradckpt_dist.impact.weights import GradientWeights
from gradckpt_dist.knowledge import Scope
from gradckpt_dist.memory import memory_meter
from gradckpt_dist.peaks import StepPeaks
from gradckpt_dist.probing import Prober, ProbeSchedule
from gradckpt_dist.sampling import Sampler
from gradckpt_dist.schedule import SAMPLES_PER_WINDOW
from gradckpt_dist.storage import StorageContext
from gradckpt_dist.storage.ledger import Measurement


@dataclass(frozen=True, kw_only=True)
class Window:
    """What was gathered since statistics were last launched, in ``samples`` sampled steps; no probe before ``turn``.

    ``sums`` and ``maxima`` are what would travel, the former in full, the latter with 0 for
    what is measured when they do, or empty.
    """

    sums: torch.Tensor
    maxima: list[float]
    samples: int
    turn: int


class Observer:
    """Holds the sampler, and a prober if ``turns`` are given.

    ``turn`` counts the sampled steps that could have had a probe: equal on all ranks.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        scope: Scope,
        device: torch.device,
        context: StorageContext,
        turns: ProbeSchedule | None,
    ) -> None:
        self.impact = create_impact(scope.metric, scope.blocks, device)
        self._byte_counts = scope.byte_counts
        self._turns = turns
        self.turn = 0
        self._book: CostBook | None = None
        self._statistics: ProbeStatistics | None = None
        self.prober: Prober | None = None
        if turns is not None:
            clock = DeviceClock(device)
            self._book = CostBook(scope.kinds, scope.storages, clock)
            self._statistics = ProbeStatistics(scope.blocks, scope.lossy, device)
            self.prober = Prober(modules, self._book, self._statistics, clock, context)
        self._meter = memory_meter(device)
        self._peaks = StepPeaks(self._meter)
        self.sampler = Sampler(self.impact, self._peaks, self.prober)
        self._modules = list(modules)
        self._lossy = bool(scope.lossy)
        self._device = device
        self._weights: GradientWeights | None = None
        self._measurement: Measurement | None = None
        self._forwards_in_flight = 1
        self._rows = _probed_rows(scope, turns)
        self._samples = self._first_turn = 0
        self._sent_blocks: tuple[int, ...] = ()
        self._before: Window | None = None

    def attach(self, root: nn.Module) -> None:
        """Where lossy storages are on offer, watch how the gradient of ``root`` is shared out over blocks."""
        if self.prober is not None and self._lossy:
            self._weights = GradientWeights(root, self._modules, self._device)

    def begin(self, *, measured: bool, may_probe: Callable[[int], bool]) -> Sampler:
        """Start a sampled step; ``may_probe`` says of which blocks there may be probes, the same on all ranks.

        A step that is measured has no probe, which would count in the peak.
        """
        if measured:
            self._peaks.begin()
            self.sampler.begin(measured=True)
        else:
            turns = () if self._turns is None else self._turns.turns(self.turn)
            self.sampler.begin(measured=False, turns=[turn for turn in turns if may_probe(turn.block)])
            self.turn += 1
        return self.sampler

    def gather_gradients(self) -> None:
        """The step's gradients are complete and have not been set to zero yet."""
        if self._weights is not None and self.sampler.gathers_impact:
            self._weights.gather(self.impact.step_scale())

    def end(self) -> None:
        """Close the sampled step."""
        self._samples += 1
        measurement = self.sampler.end()
        if measurement is not None:
            self._measurement = measurement
            self._forwards_in_flight = measurement.forwards_in_flight
            self._peaks.end()

    def take_sums(self) -> torch.Tensor:
        """For the SUM all-reduce, float64 on the device: the windows of impact, probes and gradients.

        Of the probes' table [blocks, fields], the rows of the blocks that had a turn. Take the maxima first.
        """
        window = self._take_window()
        self._sent_blocks = () if self._turns is None else self._turns.blocks(window.turn, self.turn)
        return self._rows.pack(window.sums, self._sent_blocks)

    def unpacked(self, sums: Sequence[float]) -> list[float]:
        """What ``take_sums`` last gave, summed over ranks, in full."""
        return self._rows.unpack(sums, self._sent_blocks)

    def take_maxima(self, plugin_seconds: float) -> list[float]:
        """For the MAX all-reduce; zeros where nothing was measured."""
        measured, costs = self._take_measured()
        return [*measured, -float(self._meter.available_bytes()), plugin_seconds, *costs]

    def window(self) -> Window | None:
        """A copy of what was gathered since statistics were last launched; None if there was no sampled step."""
        if not self._samples:
            return None
        measured, costs = self._take_measured()
        maxima = [*measured, 0.0, 0.0, *costs]
        self._before = replace(self._take_window(), maxima=maxima)
        self._samples, self._first_turn = self._before.samples, self._before.turn
        return replace(self._before, sums=self._before.sums.clone())

    def restart(self, turn: int, window: Window | None, costs: Costs | None) -> None:
        """Drop what was gathered; go on from the probes' turn ``turn``, after ``window``, and from these costs."""
        self._take_measured()
        self._take_window()
        if self._book is not None and costs is not None:
            self._book.restart(costs)
        self.turn = self._first_turn = turn
        if window is not None:
            self._before = replace(window, sums=window.sums.to(self._device))
            self._samples, self._first_turn = window.samples, window.turn

    def _take_window(self) -> Window:
        gatherers = (self.impact, self._statistics, self._weights)
        sums = torch.cat([gatherer.take_window() for gatherer in gatherers if gatherer is not None])
        before, self._before = self._before, None
        if before is not None:
            sums += before.sums
        window = Window(sums=sums, maxima=[], samples=self._samples, turn=self._first_turn)
        self._samples, self._first_turn = 0, self.turn
        return window

    def _take_measured(self) -> tuple[list[float], list[float]]:
        """Bytes by block and in all; costs."""
        measured, self._measurement = self._measurement, None
        if measured is None:
            values = [0.0] * self._byte_counts
        else:
            by_block = (*measured.keep_bytes, *measured.recompute_bytes, *measured.stored_bytes)
            peaks = (self._peaks.blocks_bytes, self._peaks.loss_bytes)
            totals = (measured.held_bytes, measured.peak_bytes, *peaks, measured.forwards_in_flight)
            values = [*map(float, (*by_block, *totals))]
        costs = [] if self._book is None else self._book.take_maxima(self._forwards_in_flight)
        old = [] if self._before is None else self._before.maxima
        if old:
            values = [*map(max, old[: len(values)], values)]
            costs = [*map(max, old[len(values) + 2 :], costs)]
        return values, costs


def probe_schedule(scope: Scope, interval: int) -> ProbeSchedule | None:
    """Whose turn it is to be probed; None where nothing needs to be."""
    if not scope.probed:
        return None
    return ProbeSchedule(
        kinds=scope.kinds,
        storages=scope.storages,
        lossy=frozenset(scope.lossy),
        interval=interval,
        samples=SAMPLES_PER_WINDOW - 1,
    )


def _probed_rows(scope: Scope, turns: ProbeSchedule | None) -> SparseRows:
    """Where the table of ``ProbeStatistics`` is, and how much of it travels: nothing, if no storage is lossy."""
    rows = 0 if turns is None else scope.blocks
    capacity = turns.most_blocks if turns is not None and scope.lossy else 0
    start = scope.fields * scope.blocks + 2
    return SparseRows(start=start, rows=rows, width=block_fields(len(scope.lossy)), capacity=capacity)
