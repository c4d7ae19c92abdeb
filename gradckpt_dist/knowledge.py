"""What the ranks of a domain have agreed on: impacts, bytes and costs, folded in at each decision, equal on all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from gradckpt_dist.config import LOSSY_STORAGES, Config
from gradckpt_dist.cost import CostTable
from gradckpt_dist.cost.agreed import MOST_BYTES, Costs
from gradckpt_dist.cost.budget import Budget
from gradckpt_dist.cost.kind import kinds_of
from gradckpt_dist.impact import IMPACTS, RunningImpact
from gradckpt_dist.impact.base import MEMORY, MEMORY_BESIDE_PROBES
from gradckpt_dist.impact.expected import ExpectedErrors
from gradckpt_dist.impact.probe import block_fields
from gradckpt_dist.mask import Mask
from gradckpt_dist.policy import Evidence

_BYTES_BY_BLOCK = 3
_TOTALS = 5
_OF_THIS_WORLD = (
    "held_bytes",
    "peak_bytes",
    "outside_bytes",
    "blocks_peak_bytes",
    "loss_peak_bytes",
    "loss_bytes",
    "available_bytes",
)


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What is observed: by block, the number of its kind; the storages on offer, the lossy among them; the metric."""

    kinds: tuple[int, ...]
    storages: tuple[str, ...]
    lossy: tuple[str, ...]
    metric: str
    probed: bool
    """Whether costs and errors are measured; the norm alone is gathered otherwise."""

    @classmethod
    def of(cls, modules: Sequence[nn.Module], config: Config) -> Self:
        """What this configuration needs to know of these blocks."""
        lossy = tuple(name for name in config.storages if name in LOSSY_STORAGES)
        return cls(
            kinds=kinds_of(modules),
            storages=config.storages,
            lossy=lossy,
            metric=config.impact if lossy else "norm",
            probed=bool(modules) and (config.policy == "budget" or config.threshold.low_impact_storage in lossy),
        )

    @property
    def blocks(self) -> int:
        return len(self.kinds)

    @property
    def fields(self) -> int:
        """Numbers that the metric gathers per block."""
        return IMPACTS[self.metric].fields

    @property
    def byte_counts(self) -> int:
        """Numbers that a measured step gives: of bytes by block, then in all."""
        return _BYTES_BY_BLOCK * self.blocks + _TOTALS


class Knowledge:
    """Folds in the vectors that travel, and says what they taught."""

    def __init__(self, scope: Scope, budget: Budget) -> None:
        self._scope = scope
        self.budget = budget
        memory = MEMORY_BESIDE_PROBES if scope.probed else MEMORY
        self.running = RunningImpact(scope.blocks, scope.fields, memory)
        self.costs = Costs(scope.kinds, scope.storages) if scope.probed else None
        self.errors = ExpectedErrors(scope.kinds, scope.lossy, scope.metric) if scope.probed else None
        self.stored_bytes: dict[str, tuple[int, ...]] = {}
        self.held_bytes = self.peak_bytes = self.outside_bytes = self.available_bytes = 0
        self.blocks_peak_bytes = self.loss_peak_bytes = self.loss_bytes = 0
        self.forwards_in_flight = 1
        self.plugin_seconds = 0.0
        self._measured_storages: tuple[str, ...] | None = None
        self._costs_table: CostTable | None = None

    @property
    def process_peak_bytes(self) -> int:
        """The most that a rank's process has used in the last measured step; 0 before."""
        return max(self.blocks_peak_bytes, self.loss_peak_bytes)

    def update(self, sums: Sequence[float], maxima: Sequence[float], mask: Mask) -> None:
        """Fold in what all ranks sent, as ``Observer`` gives it; ``mask`` was in force while it was measured."""
        impact_size = self._scope.fields * self._scope.blocks + 2
        self.running.update(sums[:impact_size])
        counts = self._scope.byte_counts
        self._update_bytes(maxima[: counts - _TOTALS], maxima[counts - _TOTALS : counts], mask)
        available, self.plugin_seconds, *costs = maxima[counts:]
        self.available_bytes = int(-available) if 0 <= -available <= MOST_BYTES else self.available_bytes
        if self.costs is not None and self.errors is not None:
            probes_size = self._scope.blocks * block_fields(len(self._scope.lossy)) + 1
            probes, weights = sums[impact_size : impact_size + probes_size], sums[impact_size + probes_size :]
            self.errors.update(probes, weights, self.running.mean_square)
            self.costs.update(costs)
        self._costs_table = self._table()

    def evidence(self, current: Mask, change_seconds: float = 0.0) -> Evidence:
        """What a policy reads; a change of mask costs ``change_seconds`` by itself."""
        costs = self._costs_table
        return Evidence(
            current=current,
            impacts=self.running.impacts(),
            stored_bytes=dict(self.stored_bytes),
            costs=costs,
            limits=None if costs is None else self.budget.limits(costs, self.available_bytes, self._planned_share()),
            headroom_bytes=self._headroom_bytes(),
            peak_limit_bytes=self._peak_limit_bytes(),
            outside_bytes=self.outside_bytes,
            change_seconds=change_seconds,
            forwards_in_flight=self.forwards_in_flight,
        )

    def stats(self, mask: Mask) -> dict[str, Any]:
        """What is known, and what it predicts of ``mask``; bytes are the most over ranks."""
        evidence, storages = self.evidence(mask), mask.storages
        held, peak = evidence.bytes_of(storages), evidence.peak_of(storages)
        return {
            "impacts": list(evidence.impacts),
            "stored_bytes": {name: list(values) for name, values in self.stored_bytes.items()},
            "predicted_held_bytes": None if held is None else held + self.outside_bytes,
            "predicted_peak_bytes": None if peak is None else peak + self.outside_bytes,
            "held_bytes": self.held_bytes,
            "measured_peak_bytes": self.peak_bytes,
            "process_peak_bytes": self.process_peak_bytes,
            "predicted_process_peak_bytes": evidence.process_peak_of(storages),
            "relative_error_predicted": evidence.error_of(storages),
            "decisions": self.running.decisions,
            "dropped_samples": self.running.dropped_samples,
        }

    def may_probe(self, index: int) -> bool:
        """Whether what is left at the process's peak suffices to run this block once more beside itself."""
        needed = None if self.costs is None else self.costs.probe_bytes(index)
        if needed is None or self._measured_storages is None:
            return True
        headroom = self._headroom_bytes()
        return needed <= (self.available_bytes - self.process_peak_bytes if headroom is None else headroom)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, the same on all ranks."""
        return {
            "mean_square": list(self.running.mean_square),
            "decisions": self.running.decisions,
            "dropped_samples": self.running.dropped_samples,
            "stored_bytes": {name: list(values) for name, values in self.stored_bytes.items()},
            "bytes": {name: getattr(self, name) for name in _OF_THIS_WORLD},
            "measured_storages": self._measured_storages and list(self._measured_storages),
            "plugin_seconds": self.plugin_seconds,
            "errors": None if self.errors is None else self.errors.state_dict(),
            "costs": None if self.costs is None else self.costs.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], *, same_world: bool = True) -> None:
        """Go on from ``state_dict``; what was gathered for another metric or other storages is gathered again.

        So are, unless it is of the ``same_world``, the bytes of whole processes: shards have another size, and another
        number of ranks shares a host.
        """
        if len(state["mean_square"]) in {0, self._scope.fields * self._scope.blocks}:
            self.running.mean_square = list(state["mean_square"])
            self.running.decisions = state["decisions"]
        self.running.dropped_samples = state["dropped_samples"]
        self.stored_bytes = {name: tuple(values) for name, values in state["stored_bytes"].items()}
        if self.errors is not None and state["errors"] is not None:
            self.errors.load_state_dict(state["errors"])
        if self.costs is not None and state["costs"] is not None:
            self.costs.load_state_dict(state["costs"])
        measured = state["measured_storages"]
        known = same_world and measured is not None and set(measured) <= set(self._scope.storages)
        self._measured_storages = tuple(measured) if known else None
        for name in _OF_THIS_WORLD:
            setattr(self, name, state["bytes"][name] if known else 0)
        self.plugin_seconds = state["plugin_seconds"]
        self._costs_table = self._table()

    def _update_bytes(self, by_block: Sequence[float], totals: Sequence[float], mask: Mask) -> None:
        if not all(0 <= value <= MOST_BYTES for value in (*by_block, *totals)) or not totals[0]:
            return
        held, peak, blocks_peak, loss_peak, forwards = (int(value) for value in totals)
        self.forwards_in_flight = max(1, forwards)
        blocks = self._scope.blocks
        keep, recompute, stored = (tuple(map(int, by_block[i * blocks : (i + 1) * blocks])) for i in range(3))
        # A compiled variant does not run what `keep` would: then what was known before stays.
        keep = tuple(new or old for new, old in zip(keep, self.stored_bytes.get("keep", keep), strict=True))
        self.held_bytes, self.peak_bytes = held, peak
        self.blocks_peak_bytes, self.loss_peak_bytes = blocks_peak, loss_peak
        self._measured_storages = mask.storages
        self.outside_bytes = max(0, held - sum(stored))
        self.stored_bytes |= {"keep": keep, "recompute": recompute}
        for name in set(mask.storages) - {"keep", "recompute"}:
            known = self.stored_bytes.get(name, keep)
            self.stored_bytes[name] = tuple(
                stored[i] if used == name else known[i] for i, used in enumerate(mask.storages)
            )

    def _planned_share(self) -> float:
        return 1.0 if self.errors is None else self.errors.planned_share()

    def _headroom_bytes(self) -> int | None:
        if self.budget.is_fraction or self._measured_storages is None:
            return None
        return self.budget.limit_bytes(self.available_bytes) - self.process_peak_bytes

    def _peak_limit_bytes(self) -> int | None:
        headroom = self._headroom_bytes()
        if headroom is None:
            return None
        return self.peak_bytes + headroom - self.budget.reserve_bytes(self.available_bytes)

    def _table(self) -> CostTable | None:
        """With such a fixed part and such a loss that the measured peaks are predicted for the mask that was in force.

        Where the loss had no peak of its own, it is what it was known to be, or at most what would not have shown.
        """
        if self.costs is None or self.errors is None or self._measured_storages is None:
            return None
        errors = self.errors.squared(self._scope.metric, self.running.mean_square)
        table = self.costs.table(dict(zip(self._scope.lossy, errors.T, strict=True)), self.stored_bytes)
        table = dataclasses.replace(table, forwards_in_flight=self.forwards_in_flight)
        choice = table.choice(self._measured_storages)
        fixed_bytes = max(0, self.blocks_peak_bytes - table.peak_bytes_of(choice))
        loss_bytes = max(0, self.process_peak_bytes - fixed_bytes - table.held_bytes_of(choice))
        self.loss_bytes = loss_bytes if self.loss_peak_bytes else min(self.loss_bytes, loss_bytes)
        return table.beside(fixed_bytes=fixed_bytes, loss_bytes=self.loss_bytes)
