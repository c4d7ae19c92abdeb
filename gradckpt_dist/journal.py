"""What an engine tells: lines of the event log, and messages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from gradckpt_dist.agreement import Agreement
from gradckpt_dist.config import Config
from gradckpt_dist.events import EventLog
from gradckpt_dist.mask import Mask
from gradckpt_dist.policy import BudgetPlan, Plan
from gradckpt_dist.version import __version__

logger = logging.getLogger("gradckpt_dist")

Stats = Callable[[], Mapping[str, Any]]

_DECISION_STATS = (
    "impacts",
    "theta",
    "predicted_peak_bytes",
    "measured_peak_bytes",
    "predicted_held_bytes",
    "held_bytes",
    "predicted_process_peak_bytes",
    "process_peak_bytes",
    "relative_error_predicted",
    "dropped_samples",
)
_OUT_OF_MEMORY_STATS = ("epoch", "mask", "predicted_process_peak_bytes", "process_peak_bytes", "held_bytes")


class Journal:
    """One engine's, on one rank. What is the same on all ranks of a domain comes from its rank 0 alone."""

    def __init__(self, config: Config, agreement: Agreement) -> None:
        self._rank = agreement.rank
        self._ranks = agreement.ranks
        writes = agreement.rank == 0 or config.log_level == "debug"
        self._log = EventLog(config.log_dir, agreement.global_rank, all_ranks=writes)
        self._warned_infeasible = False

    def start(self, mask: Mask, config: Config) -> None:
        """The plugin has been enabled."""
        self._log.write(
            "start",
            version=__version__,
            torch=torch.__version__,
            ranks=self._ranks,
            blocks=list(mask.blocks),
            mask=list(mask.storages),
            digest=mask.digest,
            config=config.to_dict(),
        )
        if self._rank == 0:
            logger.info("gradckpt: %d blocks, %d ranks, policy %s", len(mask), self._ranks, config.policy)

    def decision(self, step: int, mask: Mask, stats: Stats, plan: Plan | None, **also: Any) -> None:
        """A mask was agreed on; the plan is known to rank 0. ``stats`` is asked only where there is a log to write."""
        error_price = plan.error_price if isinstance(plan, BudgetPlan) else None
        reason = plan.reason if plan else None
        self._mask("decision", step, mask, stats, reason=reason, error_price=error_price, **also)
        if isinstance(plan, BudgetPlan) and not plan.feasible and not self._warned_infeasible:
            self._warned_infeasible = True
            logger.warning("gradckpt: step %d: %s; training goes on", step, plan.reason)

    def set_mask(self, step: int, mask: Mask, stats: Stats, **also: Any) -> None:
        """The user has pinned a mask."""
        self._mask("set_mask", step, mask, stats, reason="set by the user", **also)

    def out_of_memory(self, step: int, stats: Mapping[str, Any], config: Config) -> None:
        """An allocation has failed in this step."""
        found = {name: stats[name] for name in _OUT_OF_MEMORY_STATS}
        self._log.write("out_of_memory", step=step, **found)
        logger.error(
            "gradckpt: rank %d is out of memory in step %d under mask %s; predicted peak %s bytes, last measured %d "
            "bytes; lower memory_budget (now %s) or raise reserve (now %s)",
            self._rank,
            step,
            ",".join(found["mask"]),
            found["predicted_process_peak_bytes"],
            found["process_peak_bytes"],
            config.memory_budget,
            config.reserve,
        )

    def _mask(self, event: str, step: int, mask: Mask, stats: Stats, **also: Any) -> None:
        if self._rank == 0:
            logger.debug("gradckpt: step %d, epoch %d, mask %s", step, mask.epoch, ",".join(mask.storages))
        if not self._log.is_open:
            return
        found = stats()
        self._log.write(
            event,
            step=step,
            epoch=mask.epoch,
            digest=mask.digest,
            mask=list(mask.storages),
            ranks=self._ranks,
            **{name: found[name] for name in _DECISION_STATS},
            **also,
        )
