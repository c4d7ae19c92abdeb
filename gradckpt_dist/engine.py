"""The loop: observe, agree, decide, apply, at the boundaries between training steps."""

from __future__ import annotations

import enum
import logging
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gradckpt_dist.agreement import Agreement, Decision
from gradckpt_dist.blocks import Block, BlockSwitch
from gradckpt_dist.boundary import StepBoundary
from gradckpt_dist.config import Config
from gradckpt_dist.errors import MaskError
from gradckpt_dist.events import EventLog
from gradckpt_dist.impact import create_impact
from gradckpt_dist.knowledge import Knowledge
from gradckpt_dist.mask import Mask
from gradckpt_dist.policy import Plan, create_policy
from gradckpt_dist.runtime import BlockRuntime, Gate
from gradckpt_dist.sampling import Sampler
from gradckpt_dist.schedule import Schedule
from gradckpt_dist.storage.ledger import Measurement
from gradckpt_dist.version import __version__

logger = logging.getLogger("gradckpt_dist")

_NEVER = sys.maxsize


class Turn(enum.Enum):
    """Where the decision in flight is; each state lasts from one boundary to the next."""

    IDLE = enum.auto()
    """No decision is in flight."""
    REDUCING = enum.auto()
    """The all-reduces were launched."""
    BROADCASTING = enum.auto()
    """They were collected; rank 0's decision is on its way."""


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
    ) -> None:
        self.config = config
        self._agreement = agreement
        self._policy = create_policy(config)
        self._schedule = Schedule(warmup_steps=config.warmup_steps, interval=config.interval)
        self._gate = Gate(config.seed)
        self._runtimes = [BlockRuntime(i, block.module, self._gate, config.seed) for i, block in enumerate(blocks)]
        self._switches = [BlockSwitch(block, run) for block, run in zip(blocks, self._runtimes, strict=True)]
        self._impact = create_impact(config.impact, len(blocks), device)
        self._sampler = Sampler(self._impact)
        self._knowledge = Knowledge(len(blocks))
        self._log = EventLog(config.log_dir, agreement.rank, all_ranks=config.log_level == "debug")
        self._step = -1
        self._wake_step = 0
        self._turn = Turn.IDLE
        self._pinned = False
        self._plan: Plan | None = None
        self._theta: float | None = None
        self._measurement: Measurement | None = None
        self._plugin_seconds = 0.0
        names = tuple(block.name for block in blocks)
        self._boundary: StepBoundary | None = None
        self._apply(Mask(blocks=names, storages=self._policy.initial(len(names))))

    def install(self, root: nn.Module, optimizer: Optimizer | None) -> None:
        """Switch the blocks and listen for steps.

        Raises:
            ConflictError: a block is switched already; then nothing has been changed.
        """
        installed: list[BlockSwitch] = []
        try:
            for switch in self._switches:
                switch.install()
                installed.append(switch)
        except BaseException:
            for switch in installed:
                switch.undo()
            raise
        self._boundary = StepBoundary(root, optimizer, self)
        self._log_start()

    def join_forward(self) -> None:
        """Take part in a training forward of the root that is under way, its hooks having been gathered already."""
        if self._boundary is not None:
            self._boundary.before_forward()

    # -- what users call ------------------------------------------------------------------------------------------

    @property
    def mask(self) -> Mask:
        """The mask in force; after ``disable``, the last one."""
        return self._mask

    @property
    def enabled(self) -> bool:
        return self._boundary is not None

    def stats(self) -> dict[str, Any]:
        """What was last agreed, and what this rank has counted. Bytes are the most over ranks.

        ``recomputes`` counts, by block, the forwards run again in full since ``enable``; ``plugin_seconds`` is this
        rank's host time at boundaries.
        """
        knowledge = self._knowledge
        evidence = knowledge.evidence(self._mask)
        return {
            "step": self._step,
            "epoch": self._mask.epoch,
            "mask": list(self._mask.storages),
            "impacts": list(evidence.impacts),
            "theta": self._theta,
            "stored_bytes": {name: list(values) for name, values in knowledge.stored_bytes.items()},
            "predicted_held_bytes": evidence.bytes_of(self._mask.storages),
            "predicted_peak_bytes": evidence.peak_of(self._mask.storages),
            "held_bytes": knowledge.held_bytes,
            "measured_peak_bytes": knowledge.peak_bytes,
            "recomputes": [runtime.recomputes for runtime in self._runtimes],
            "decisions": knowledge.running.decisions,
            "dropped_samples": knowledge.running.dropped_samples,
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

    def state_dict(self) -> dict[str, Any]:
        """Plain values with which another run goes on: mask, epoch, step, agreed impacts and bytes, theta, noise.

        It is the same on every rank and holds nothing that depends on their number.
        """
        return {
            "version": __version__,
            "blocks": list(self._mask.blocks),
            "storages": list(self._mask.storages),
            "epoch": self._mask.epoch,
            "step": self._step,
            "pinned": self._pinned,
            "theta": self._theta,
            "knowledge": self._knowledge.state_dict(),
            "noise": self._gate.context.noise.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``; every rank calls it between the same two steps.

        Raises:
            MaskError: the state is of other blocks, or has a storage that ``Config.storages`` does not allow.
            AgreementError: another rank was given another state.
        """
        if list(self._mask.blocks) != list(state["blocks"]):
            raise MaskError(
                f"the state is of {len(state['blocks'])} blocks {state['blocks'][:3]}…, this model has "
                f"{len(self._mask)} blocks {list(self._mask.blocks[:3])}…; load the state of the same model"
            )
        storages = self._checked(state["storages"]).storages
        mask = Mask(blocks=self._mask.blocks, storages=storages, epoch=state["epoch"])
        self._agreement.compare({"epoch": mask.epoch, "mask": list(storages), "step": state["step"]}, self._step)
        self._drain()
        self._knowledge.load_state_dict(state["knowledge"])
        self._gate.context.noise.load_state_dict(state["noise"])
        self._pinned, self._theta = state["pinned"], state["theta"]
        self._step, self._wake_step = state["step"], state["step"] + 1
        self._apply(mask)

    def disable(self) -> None:
        """Restore every forward and give up the process group; the model is as it was before ``enable``."""
        if self._boundary is None:
            return
        self._boundary.remove()
        self._boundary = None
        for switch in self._switches:
            switch.undo()
        try:
            self._drain()
        finally:
            self._agreement.close()

    # -- boundaries -----------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        self._step += 1
        if self._step < self._wake_step:
            return
        started = time.perf_counter()
        if self._gate.watch is not None:
            self._gate.watch = None
            self._measurement = self._sampler.end() or self._measurement
        self._advance()
        if not self._pinned and self._schedule.is_sampled(self._step):
            self._sampler.begin(measured=self._schedule.is_measured(self._step))
            self._gate.watch = self._sampler
        self._wake_step = self._next_wake()
        self._plugin_seconds += time.perf_counter() - started

    def begin_forward(self) -> None:
        self._gate.open = True
        if self._gate.watch is not None:
            self._sampler.begin_forward()

    def end_forward(self) -> None:
        self._gate.open = False
        if self._gate.watch is not None:
            self._sampler.end_forward()

    def pause(self) -> None:
        self._gate.open = False

    # -- one turn of the loop -------------------------------------------------------------------------------------

    def _advance(self) -> None:
        if self._turn is Turn.REDUCING:
            self._decide()
        elif self._turn is Turn.BROADCASTING:
            self._receive()
        if self._turn is Turn.IDLE and not self._pinned and self._schedule.is_decision(self._step):
            self._launch()

    def _launch(self) -> None:
        maxima = self._knowledge.maxima(self._measurement, self._plugin_seconds)
        self._measurement = None
        self._agreement.launch(self._impact.take_window(), maxima, self._step, self._mask.epoch)
        self._launched_step = self._step
        self._turn = Turn.REDUCING

    def _decide(self) -> None:
        sums, maxima = self._agreement.collect()
        self._knowledge.update(sums, maxima, self._mask)
        decision = None
        if self._agreement.rank == 0:
            self._plan = self._policy.plan(self._knowledge.evidence(self._mask))
            theta = math.nan if self._plan.theta is None else self._plan.theta
            mask = self._mask.replaced(self._plan.storages)
            decision = Decision(mask=mask, step=self._launched_step, theta=theta)
        self._agreement.announce(decision, len(self._mask))
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
            self._agreement.collect()
        elif self._turn is Turn.BROADCASTING:
            self._agreement.receive(self._mask.blocks, self._mask.epoch)
        self._turn = Turn.IDLE

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

    def _next_wake(self) -> int:
        if self._turn is not Turn.IDLE or self._gate.watch is not None:
            return self._step + 1
        if self._pinned:
            return _NEVER
        step = self._step + 1
        while not (self._schedule.is_sampled(step) or self._schedule.is_decision(step)):
            step += 1
        return step

    def _log_start(self) -> None:
        self._log.write(
            "start",
            version=__version__,
            torch=torch.__version__,
            ranks=self._agreement.ranks,
            blocks=list(self._mask.blocks),
            mask=list(self._mask.storages),
            digest=self._mask.digest,
            config=self.config.to_dict(),
        )
        if self._agreement.rank == 0:
            logger.info(
                "gradckpt: %d blocks, %d ranks, policy %s", len(self._mask), self._agreement.ranks, self._policy.name
            )

    def _log_mask(self, event: str) -> None:
        stats = self.stats()
        plan = self._plan
        if self._agreement.rank == 0:
            logger.debug("gradckpt: step %d, epoch %d, mask %s", self._step, self._mask.epoch, ",".join(stats["mask"]))
        self._log.write(
            event,
            step=self._step,
            epoch=self._mask.epoch,
            digest=self._mask.digest,
            mask=stats["mask"],
            impacts=stats["impacts"],
            theta=self._theta,
            predicted_peak_bytes=stats["predicted_peak_bytes"],
            measured_peak_bytes=stats["measured_peak_bytes"],
            predicted_held_bytes=stats["predicted_held_bytes"],
            held_bytes=stats["held_bytes"],
            relative_error_budget=self.config.gradient_tolerance,
            relative_error_predicted=0.0,
            dropped_samples=stats["dropped_samples"],
            plugin_seconds=self._knowledge.plugin_seconds,
            reason="set by the user" if event == "set_mask" else plan.reason if plan else None,
            ranks=self._agreement.ranks,
        )
