"""The loop: observe, agree, decide, apply, at the boundaries between training steps."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gradckpt_dist.agreement import Agreement, Decision
from gradckpt_dist.blocks import Block, BlockSwitch, install_all
from gradckpt_dist.boundary import StepBoundary
from gradckpt_dist.config import Config
from gradckpt_dist.cost.budget import Budget
from gradckpt_dist.errors import MaskError
from gradckpt_dist.journal import Journal
from gradckpt_dist.knowledge import Knowledge, Scope
from gradckpt_dist.mask import Mask
from gradckpt_dist.observer import Observer, probe_schedule
from gradckpt_dist.out_of_memory import OutOfMemoryReport
from gradckpt_dist.planning import PlanningDesk
from gradckpt_dist.policy import BudgetPolicy, Plan, create_policy, require_feasible
from gradckpt_dist.runtime import BlockRuntime, Gate
from gradckpt_dist.saved_state import SavedState, Totals, plain
from gradckpt_dist.schedule import Schedule, Turn
from gradckpt_dist.version import __version__

_NEVER = sys.maxsize


class Engine:
    """Holds one model's mask and moves it. Made by ``gradckpt_dist.enable``.

    The agreed mask changes only between two training steps, and on all ranks between the same two.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        config: Config,
        agreement: Agreement,
        device: torch.device,
        start: Sequence[str] | None = None,
    ) -> None:
        """``start`` is the first mask's storages; without it they are the policy's."""
        self.config = config
        self._agreement = agreement
        self._policy = create_policy(config)
        self._schedule = Schedule(warmup_steps=config.warmup_steps, interval=config.interval)
        self._gate = Gate(config.seed)
        self._runtimes = [BlockRuntime(i, block.module, self._gate) for i, block in enumerate(blocks)]
        self._switches = [BlockSwitch(block, run) for block, run in zip(blocks, self._runtimes, strict=True)]
        modules = [block.module for block in blocks]
        scope = Scope.of(modules, config)
        self._observer = Observer(modules, scope, device, self._gate.context, probe_schedule(scope, config.interval))
        self._knowledge = Knowledge(scope, Budget.of(config))
        self._journal = Journal(config, agreement)
        self._step, self._wake_step, self._launched_step = -1, 0, 0
        self._turn = Turn.IDLE
        self._pinned = self._feasible = False
        self._desk = PlanningDesk()
        self._plan: Plan | None = None
        self._totals: Totals | None = None
        self._theta: float | None = None
        self._plugin_seconds = 0.0
        names = tuple(block.name for block in blocks)
        self._boundary: StepBoundary | None = None
        self._on_disable: list[Callable[[], None]] = []
        self._apply(Mask(blocks=names, storages=tuple(start or self._policy.initial(len(names)))))

    def install(self, root: nn.Module, optimizer: Optimizer | None) -> None:
        """Switch the blocks and listen for steps.

        Raises:
            ConflictError: a block is switched already; then nothing has been changed.
        """
        install_all(self._switches)
        self._observer.attach(root)
        self._boundary = StepBoundary(root, optimizer, self)
        self._memory_report = OutOfMemoryReport(self._report_out_of_memory)
        self._journal.start(self._mask, self.config)

    def on_disable(self, undo: Callable[[], None]) -> None:
        """Call ``undo`` when the plugin is switched off."""
        self._on_disable.append(undo)

    def join_forward(self) -> None:
        """Take part in a training forward of the root that is under way, its hooks having been gathered already."""
        if self._boundary is not None:
            self._boundary.before_forward()

    def miss_forward(self, *, synchronised: bool) -> None:
        """Keep up with the other ranks in a training forward of theirs, as ``StepBoundary.miss_forward`` does."""
        if self._boundary is not None:
            self._boundary.miss_forward(synchronised=synchronised)

    # -- what users call ------------------------------------------------------------------------------------------

    @property
    def mask(self) -> Mask:
        """The mask in force; after ``disable``, the last one."""
        return self._mask

    @property
    def enabled(self) -> bool:
        return self._boundary is not None

    @property
    def blocks(self) -> tuple[Block, ...]:
        """What the mask is about, in its order."""
        return tuple(switch.block for switch in self._switches)

    @property
    def gate(self) -> Gate:
        """What the blocks share, for adapters: is a training forward under way, is a block, and how they store."""
        return self._gate

    def stats(self) -> dict[str, Any]:
        """What was last agreed, and what this rank has counted. Bytes are the most over ranks.

        ``recomputes`` counts, by block, the forwards run again in full since ``enable``; ``plugin_seconds`` is this
        rank's host time at boundaries.
        """
        return {
            "step": self._step,
            "epoch": self._mask.epoch,
            "mask": list(self._mask.storages),
            "theta": self._theta,
            **self._knowledge.stats(self._mask),
            "recomputes": [runtime.recomputes for runtime in self._runtimes],
            "plugin_seconds": self._plugin_seconds,
        }

    def set_mask(self, storages: Sequence[str] | None) -> None:
        """Pin these storages, one per block, and stop deciding; None gives the mask back to the policy.

        Every rank of the domain calls it between the same two steps; ranks are compared before anything changes.

        Raises:
            MaskError: wrong length, unknown storage, or one that ``Config.storages`` does not allow.
            AgreementError: another rank was given another mask, or none within ``agreement_timeout_s``.
        """
        mask = self._mask if storages is None else self._checked(storages)
        pinned = storages is not None
        self._agreement.compare({"mask": list(mask.storages), "pinned": pinned}, self._step)
        self._drain()
        if pinned:
            self._apply(mask)
            self._log_mask("set_mask")
        self._pinned = pinned
        self._wake_step = self._step + 1

    def set_memory_budget(self, memory_budget: float | str) -> None:
        """Decide from now on by another ``Config.memory_budget``; the next decision meets it.

        Every rank of the domain calls it between the same two steps; ranks are compared before anything changes.

        Raises:
            ConfigError: not a fraction, bytes or ``auto``.
            AgreementError: another rank was given another one, or none within ``agreement_timeout_s``.
        """
        config = dataclasses.replace(self.config, memory_budget=memory_budget)
        self._agreement.compare({"memory_budget": config.memory_budget}, self._step)
        self.config = config
        self._policy = create_policy(config)
        self._knowledge.budget = Budget.of(config)

    def state_dict(self, *, alone: bool = False) -> dict[str, Any]:
        """Plain values, the same on every rank, with which another run goes on, of any number of ranks.

        Take it between two steps, on every rank: what each has gathered since the last decision is added up. A rank
        that is ``alone``, or is not joined by the others within a few seconds, leaves that part out.

        Raises:
            AgreementError: the all-reduces of the decision under way failed.
        """
        if self._boundary is not None and self._boundary.between_steps:
            self._end_sample()
        if self._turn is Turn.REDUCING:
            self._collect()
        window = None if alone else self._observer.window()
        gathered = None if window is None else self._agreement.add_up(window.sums, window.maxima, self._step)
        return SavedState(
            version=__version__,
            ranks=self._agreement.ranks,
            blocks=list(self._mask.blocks),
            storages=list(self._mask.storages),
            epoch=self._mask.epoch,
            step=self._step,
            pinned=self._pinned,
            theta=self._theta,
            feasible=self._feasible,
            in_flight=self._turn.name,
            launched_step=self._launched_step,
            probe_turn=self._observer.turn,
            totals=self._totals,
            window=None if window is None or gathered is None else plain(window, gathered),
            knowledge=self._knowledge.state_dict(),
            noise=self._gate.context.noise.state_dict(),
        ).to_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``; every rank calls it between the same two steps.

        Raises:
            MaskError: the state is of other blocks, has a storage that ``Config.storages`` does not allow, or is none.
            AgreementError: another rank was given another state.
        """
        saved = SavedState.from_dict(state)
        saved.require_blocks(self._mask.blocks)
        storages = self._checked(saved.storages).storages
        self._agreement.compare(saved.facts(), self._step)
        self._drain()
        self._end_sample()
        rank, ranks = self._agreement.rank, self._agreement.ranks
        self._knowledge.load_state_dict(saved.knowledge, same_world=ranks == saved.ranks)
        self._observer.restart(saved.probe_turn, saved.window_for(rank, ranks), self._knowledge.costs)
        self._pinned, self._theta, self._feasible = saved.pinned, saved.theta, saved.feasible
        self._gate.context.noise.load_state_dict(saved.noise)
        self._step, self._wake_step = saved.step, saved.step + 1
        self._apply(Mask(blocks=self._mask.blocks, storages=storages, epoch=saved.epoch))
        self._resume(Turn[saved.in_flight], saved)

    def disable(self) -> None:
        """Restore every forward and give up the process group; the model is as it was before ``enable``."""
        if self._boundary is None:
            return
        self._boundary.remove()
        self._boundary = None
        self._memory_report.remove()
        while self._on_disable:
            self._on_disable.pop()()
        for switch in self._switches:
            switch.undo()
        try:
            self._drain()
        finally:
            self._desk.close()
            self._agreement.close()

    # -- boundaries -----------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        self._step += 1
        if self._step < self._wake_step:
            return
        started = time.perf_counter()
        self._end_sample()
        self._advance()
        if not self._pinned and self._schedule.is_sampled(self._step):
            self._gate.watch = self._observer.begin(
                measured=self._schedule.is_measured(self._step), may_probe=self._knowledge.may_probe
            )
        self._wake_step = self._next_wake()
        self._plugin_seconds += time.perf_counter() - started

    def end_step(self) -> None:
        if self._gate.watch is not None:
            self._observer.gather_gradients()

    def begin_forward(self) -> None:
        self._gate.open = True
        self._gate.forwards += 1
        if self._gate.watch is not None:
            self._observer.sampler.begin_forward()

    def end_forward(self) -> None:
        self._gate.open = False
        if self._gate.watch is not None:
            self._observer.sampler.end_forward()

    def pause(self) -> None:
        self._gate.open = False

    # -- one turn of the loop -------------------------------------------------------------------------------------

    def _advance(self) -> None:
        if self._turn is Turn.REDUCING:
            self._begin_plan()
        elif self._turn is Turn.PLANNING:
            self._announce()
        elif self._turn is Turn.BROADCASTING:
            self._receive()
        if self._turn is Turn.IDLE and not self._pinned and self._schedule.is_decision(self._step):
            self._launch()

    def _launch(self) -> None:
        maxima = self._observer.take_maxima(self._plugin_seconds)
        self._agreement.launch(self._observer.take_sums(), maxima, self._step, self._mask.epoch)
        self._launched_step = self._step
        self._turn = Turn.REDUCING

    def _begin_plan(self) -> None:
        self._knowledge.update(*self._collect(), self._mask)
        self._totals = None
        evidence = self._knowledge.evidence(self._mask, self._gate.change_seconds)
        if self._policy.name == BudgetPolicy.name and not self._feasible and evidence.costs and evidence.limits:
            # The evidence is equal on all ranks, and so is this error.
            require_feasible(evidence.costs, evidence.limits)
            self._feasible = True
        if self._agreement.rank == 0:
            self._desk.begin(self._policy, evidence)
        self._turn = Turn.PLANNING

    def _collect(self) -> Totals:
        if self._totals is None:
            sums, maxima = self._agreement.collect()
            self._totals = self._observer.unpacked(sums), maxima
        return self._totals

    def _announce(self) -> None:
        decision = None
        self._plan = self._desk.take()
        if self._plan is not None:
            theta = math.nan if self._plan.theta is None else self._plan.theta
            mask = self._mask.replaced(self._plan.storages)
            decision = Decision(mask=mask, step=self._launched_step, theta=theta)
        self._agreement.announce(decision, len(self._mask), self._launched_step)
        self._turn = Turn.BROADCASTING

    def _receive(self) -> None:
        decision = self._agreement.receive(self._mask.blocks, self._mask.epoch)
        self._turn = Turn.IDLE
        if self._pinned:
            return
        self._theta = None if math.isnan(decision.theta) else decision.theta
        self._apply(decision.mask)
        self._log_mask("decision")

    def _apply(self, mask: Mask) -> None:
        switched = list(zip(self._runtimes, mask.storages, strict=True))
        for runtime, storage in switched:
            runtime.prepare(storage)
        for runtime, storage in switched:
            runtime.use(storage)
        self._mask = mask

    def _drain(self) -> None:
        """Finish what is in flight, so that no collective is left unmatched; its outcome is dropped."""
        if self._turn is Turn.REDUCING:
            self._collect()
            self._totals = None
        elif self._turn is Turn.PLANNING:
            self._desk.take()
        elif self._turn is Turn.BROADCASTING:
            self._agreement.receive(self._mask.blocks, self._mask.epoch)
        self._turn = Turn.IDLE

    def _resume(self, turn: Turn, saved: SavedState) -> None:
        """Bring a decision of another run to where it was; a policy plans the same from the same evidence."""
        self._launched_step, self._totals = saved.launched_step, saved.totals
        if turn in {Turn.PLANNING, Turn.BROADCASTING} and self._agreement.rank == 0:
            self._desk.begin(self._policy, self._knowledge.evidence(self._mask))
        self._turn = turn
        if turn is Turn.BROADCASTING:
            self._announce()

    # -- details --------------------------------------------------------------------------------------------------

    def _checked(self, storages: Sequence[str]) -> Mask:
        mask = self._mask.replaced(storages)
        refused = sorted(set(mask.storages) - set(self.config.storages))
        if refused:
            raise MaskError(
                f"storages {', '.join(refused)} are not allowed by this configuration; "
                f"allowed: {', '.join(self.config.storages)}; add them to `storages`"
            )
        return mask

    def _end_sample(self) -> None:
        if self._gate.watch is not None:
            self._gate.watch = None
            self._observer.end()

    def _next_wake(self) -> int:
        if self._turn is not Turn.IDLE or self._gate.watch is not None:
            return self._step + 1
        if self._pinned:
            return _NEVER
        return self._schedule.next_busy(self._step + 1)

    def _log_mask(self, event: str) -> None:
        also = {
            "relative_error_budget": self.config.gradient_tolerance,
            "plugin_seconds": self._knowledge.plugin_seconds,
        }
        if event == "set_mask":
            self._journal.set_mask(self._step, self._mask, self.stats, **also)
        else:
            self._journal.decision(self._step, self._mask, self.stats, self._plan, **also)

    def _report_out_of_memory(self) -> None:
        self._journal.out_of_memory(self._step, self.stats(), self.config)
