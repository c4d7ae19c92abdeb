"""One block's backward, run again under each storage on offer, in a sampled step."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gradckpt_dist.cost.book import CostBook
from gradckpt_dist.cost.clock import DeviceClock
from gradckpt_dist.cost.shadow import ShadowCall, ShadowRun, count_tokens, output_tensors
from gradckpt_dist.cost.trap import Gradients, Trap
from gradckpt_dist.errors import StorageError
from gradckpt_dist.impact import Impact
from gradckpt_dist.impact.probe import ProbeStatistics
from gradckpt_dist.storage import Forward, StorageContext, create_storage
from gradckpt_dist.storage.lane import OffloadLane
from gradckpt_dist.storage.ledger import Ledger
from gradckpt_dist.storage.noise import NoiseSource
from gradckpt_dist.storage.saved import Slack

logger = logging.getLogger("gradckpt_dist")


CALIBRATION_VISITS = 2
CALIBRATION_ROUNDS = 4
"""In each visit; with two of them, storages within a few percent of each other came in the wrong order too often."""
WARM_UPS = 3
"""Runs of a storage before it is timed: ``selective_half`` profiles as many calls until it has settled."""
SHARE = 0.005
"""Of the seconds of all steps, what probes may take in the long run."""
EARLY_SWEEPS = 2
EARLY_SAMPLES = 16
"""So many sweeps over all blocks come on top, half of them in the first so many sampled steps: errors rise at first."""


@dataclass(frozen=True, kw_only=True)
class ProbeTurn:
    """What is probed of one block in a sampled step: the same on all ranks, as its forward may hold collectives.

    ``keep`` always runs, first; then ``storages`` in their order; all of them ``rounds`` times, for their seconds.
    """

    block: int
    storages: tuple[str, ...]
    rounds: int = 1


@dataclass(frozen=True, kw_only=True)
class ProbeSchedule:
    """Which turns each sampled step has; a function of its number alone, so that all ranks have the same.

    First, the first block of each kind under all ``storages``, twice. Then one block after another under one storage
    after another, lossy ones more often, at the rate that ``SHARE`` allows: a step is taken to last at least as long as
    its blocks, hence ``blocks`` runs of one. At first they come more densely, ``EARLY_SWEEPS`` over all blocks being
    spent ahead. ``samples`` are the sampled steps of an interval.
    """

    kinds: tuple[int, ...]
    storages: tuple[str, ...]
    lossy: frozenset[str]
    interval: int
    samples: int

    def turns(self, number: int) -> tuple[ProbeTurn, ...]:
        """The turns of the sampled step of this number, counted from 0; often none."""
        firsts = [self.kinds.index(kind) for kind in range(max(self.kinds) + 1)]
        number -= len(firsts) * CALIBRATION_VISITS
        if number < 0:
            return (ProbeTurn(block=firsts[number % len(firsts)], storages=self.storages, rounds=CALIBRATION_ROUNDS),)
        first, last = self._items_before(number), self._items_before(number + 1)
        return tuple(map(self._item, range(first, min(last, first + len(self.kinds)))))

    def blocks(self, first: int, last: int) -> tuple[int, ...]:
        """The blocks that have a turn in the sampled steps from ``first`` up to ``last``, each once, in their order."""
        return tuple(dict.fromkeys(turn.block for number in range(first, last) for turn in self.turns(number)))

    @property
    def most_blocks(self) -> int:
        """At least as many as have a turn in one interval: the first after the kinds' own has the most."""
        return max(self.samples, self._items_before(self.samples) + 2)

    def _items_before(self, number: int) -> int:
        steady = SHARE * self.interval / self.samples / 2 * number
        early = EARLY_SWEEPS * number / (number + EARLY_SAMPLES)
        return int(len(self.kinds) * (steady + early))

    def _item(self, item: int) -> ProbeTurn:
        sweep, block = divmod(item, len(self.kinds))
        cycle = self._cycle()
        return ProbeTurn(block=block, storages=(cycle[(sweep + block) % len(cycle)],))

    def _cycle(self) -> list[str]:
        lossy = [name for name in self.storages if name in self.lossy]
        exact = [name for name in self.storages if name not in self.lossy and name != "keep"]
        return [storage for name in exact for storage in (*lossy, name)] or lossy or ["keep"]


class Prober:
    """Carries out turns: waits in the true forward of each turn's block, and acts in its backward.

    Only the first call of the block in the step is probed. A storage meets a kind of block for the first time in a run
    that counts bytes, so that it has compiled and allocated what it needs before it is timed.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        book: CostBook,
        statistics: ProbeStatistics,
        clock: DeviceClock,
        context: StorageContext | None = None,
    ) -> None:
        self._blocks = list(blocks)
        self._book = book
        self._statistics = statistics
        self._clock = clock
        # What profiles have settled is shared with training; what training would notice is not.
        self._context = replace(context or StorageContext(), lane=OffloadLane(), noise=NoiseSource(), slack=Slack())
        self._turns: dict[int, ProbeTurn] = {}
        self._traps: list[Trap] = []
        self._stopped: set[int] = set()
        self.probes = 0
        self.seconds = 0.0
        """Spent in probes so far, by the host's clock."""

    def begin(self, turns: Sequence[ProbeTurn]) -> None:
        """Start a sampled step with these turns, of as many blocks."""
        self._turns = {turn.block: turn for turn in turns}

    def end(self, impact: Impact) -> None:
        """Close the sampled step, before ``impact`` does."""
        self._book.end_step()
        if self._traps:
            self._statistics.end_step(impact.step_scale(), impact.step_values())
        for trap in self._traps:
            trap.disarm()
        self._traps, self._turns = [], {}

    def end_forward(self) -> None:
        """The model's forward has ended."""
        self._book.end_forward()

    def reruns(self, index: int) -> bool:
        """Whether the coming call of this block will be run again."""
        return index in self._turns and index not in self._stopped

    def before(self, index: int, forward: Forward, args: Any, kwargs: Any) -> ShadowCall | None:
        """A call of the block at ``index`` begins; give the result to ``after``."""
        self._book.saw_call(index, count_tokens(output_tensors((args, kwargs))))
        if not self.reruns(index):
            return None
        if not ShadowCall.possible(args, kwargs):
            self._stop(index, "it is given an object that a second run might change")
            return None
        if _holds_sharded_parts(self._blocks[index]):
            self._stop(index, "it holds FSDP units of their own, which gather and free parameters as they run")
            return None
        return ShadowCall(self._blocks[index], forward, args, kwargs)

    def after(self, index: int, call: ShadowCall | None, output: Any) -> None:
        """The call has returned ``output``."""
        if call is not None:
            turn = self._turns.pop(index)
            self._traps.append(Trap(output_tensors(output), lambda gradients: self._probe(turn, call, gradients)))

    def _probe(self, turn: ProbeTurn, call: ShadowCall, gradients: Gradients) -> None:
        if not call.intact:
            self._stop(turn.block, "its inputs are changed in place after it")
            return
        started = time.perf_counter()
        try:
            upstream = call.separated(gradients)
            self._meet(turn, call, upstream)
            for _ in range(turn.rounds):
                self._measure(turn, call, upstream)
            self.probes += 1
        except torch.OutOfMemoryError:
            self._stop(turn.block, "there is not enough memory to run it beside the true backward")
        except Exception as error:
            self._stop(turn.block, f"a second run failed ({type(error).__name__}: {error})")
        self.seconds += time.perf_counter() - started

    def _meet(self, turn: ProbeTurn, call: ShadowCall, upstream: Gradients) -> None:
        """Run each storage that is new to this kind of block, or to so many tokens, and count its bytes."""
        for name in ("keep", *turn.storages):
            if self._book.knows(turn.block, name, call.tokens) or not Ledger.available():
                continue
            try:
                for _ in range(WARM_UPS):
                    run = self._run(turn.block, name, call, upstream, Ledger(1))
            except StorageError as error:
                logger.warning("gradckpt: %s", error)
                self._book.refuse(turn.block, name)
                continue
            if run.measurement is not None:
                self._book.note_bytes(turn.block, name, call.tokens, run.measurement)

    def _measure(self, turn: ProbeTurn, call: ShadowCall, upstream: Gradients) -> None:
        """Seconds and errors."""
        reference = self._run(turn.block, "keep", call, upstream)
        marks = {"keep": reference.span}
        for name in turn.storages:
            if name == "keep" or self._book.refuses(turn.block, name):
                continue
            run = self._run(turn.block, name, call, upstream)
            marks[name] = run.span
            if name in self._statistics.lossy:
                self._statistics.add(turn.block, name, reference.gradients, run.gradients)
        self._book.note_runs(turn.block, call.tokens, marks)

    def _run(
        self, index: int, name: str, call: ShadowCall, upstream: Gradients, ledger: Ledger | None = None
    ) -> ShadowRun:
        storage = create_storage(name, self._blocks[index], self._context)
        return call.run(storage, upstream, self._clock, ledger)

    def _stop(self, index: int, reason: str) -> None:
        if not self._stopped:
            logger.warning(
                "gradckpt: %s (block %d) is not probed, nor is any other block of which this is true: %s; its costs "
                "and errors are those of its kind, or else unknown, and then lossy storages are not used for it",
                type(self._blocks[index]).__name__,
                index,
                reason,
            )
        self._stopped.add(index)


def _holds_sharded_parts(block: nn.Module) -> bool:
    return any(
        base.__name__ in {"FSDPModule", "FullyShardedDataParallel"}
        for part in block.modules()
        if part is not block
        for base in type(part).__mro__
    )
