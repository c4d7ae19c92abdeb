"""What every policy is: a pure function from evidence to a plan."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gradckpt_dist.config import LOSSY_STORAGES
from gradckpt_dist.cost import CostTable, Limits
from gradckpt_dist.mask import Mask


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What all ranks know at a decision.

    ``impacts`` is empty before the first sample. ``stored_bytes`` maps a storage to its bytes held, one number per
    block (the most over ranks); it holds ``keep`` and ``recompute`` once they were measured. ``costs`` and ``limits``
    are None before they were measured, or where the policy needs none. ``headroom_bytes`` is the limit less the peak
    that was measured under the current mask, the least over ranks; negative where the limit was exceeded.
    ``peak_limit_bytes`` is the most that blocks may hold at once. Both are None for a budget that is a fraction.
    ``outside_bytes`` is what the model's forward held beside its blocks. All bytes are those of ``forwards_in_flight``
    forwards together. ``change_seconds`` is what a change of mask costs once by itself.
    """

    current: Mask
    impacts: tuple[float, ...]
    stored_bytes: dict[str, tuple[int, ...]]
    costs: CostTable | None = None
    limits: Limits | None = None
    headroom_bytes: int | None = None
    peak_limit_bytes: int | None = None
    outside_bytes: int = 0
    change_seconds: float = 0.0
    forwards_in_flight: int = 1

    def bytes_of(self, storages: Sequence[str]) -> int | None:
        """Predicted bytes held by the blocks under these storages; None before they were measured.

        A storage that no block has used yet counts as ``keep``, the most that it can hold.
        """
        if "keep" not in self.stored_bytes:
            return None
        keep = self.stored_bytes["keep"]
        return sum(self.stored_bytes.get(name, keep)[i] for i, name in enumerate(storages))

    def peak_of(self, storages: Sequence[str]) -> int | None:
        """As ``bytes_of``, with what a recomputed block brings back while it is in backward."""
        total = self.bytes_of(storages)
        if total is None:
            return None
        keep, forwards = self.stored_bytes["keep"], self.forwards_in_flight
        held = peak = 0
        for i, name in enumerate(storages):
            held += self.stored_bytes.get(name, keep)[i]
            working_set = keep[i] // forwards if name == "recompute" else 0
            later = total - held
            peak = max(peak, held + later - later // forwards + working_set)
        return peak

    def process_peak_of(self, storages: Sequence[str]) -> int | None:
        """Predicted peak of the process under these storages; None before costs were measured."""
        return None if self.costs is None else self.costs.peak_bytes_of(self.costs.choice(storages))

    def error_of(self, storages: Sequence[str]) -> float | None:
        """Predicted relative error of the whole gradient: 0 for exact storages, None where it is not known."""
        if not set(storages) & set(LOSSY_STORAGES):
            return 0.0
        return None if self.costs is None else math.sqrt(self.costs.squared_error_of(self.costs.choice(storages)))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Storages to use next, and why. ``theta`` is None where the policy has none."""

    storages: tuple[str, ...]
    theta: float | None
    reason: str


class Policy(ABC):
    """Decides on rank 0 of a domain; deterministic, ties broken by position."""

    name: ClassVar[str]

    def initial(self, blocks: int) -> tuple[str, ...]:
        """The first mask: full recompute fits if anything fits."""
        return ("recompute",) * blocks

    @abstractmethod
    def plan(self, evidence: Evidence) -> Plan:
        """The mask that this evidence calls for."""
