"""What one process of the bench is asked to build; frozen values that travel as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

OURS = "gradckpt"
UNEVEN_BLOCKS = 12


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a model and of its batch. ``layers`` counts the demo model's blocks; the uneven model always has 12."""

    width: int
    context: int
    batch: int
    layers: int
    head_width: int

    def blocks(self, model: str) -> int:
        """How many blocks that model has."""
        return UNEVEN_BLOCKS if model == "uneven" else self.layers


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One system on one model.

    ``budget`` is a fraction, None for systems that take none. ``storages`` pins ours, one for each block; empty: no
    mask has been settled yet, or the system is a peer.
    """

    system: str
    model: str
    compiled: bool = False
    budget: float | None = None
    tolerance: float = 0.0
    storages: tuple[str, ...] = ()

    def __str__(self) -> str:
        budget = "" if self.budget is None else f" budget {self.budget:g}"
        tolerance = f" tolerance {self.tolerance:g}" if self.tolerance else ""
        return f"{self.system}{' compiled' if self.compiled else ''} on {self.model}{budget}{tolerance}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        return cls(**{**data, "storages": tuple(data["storages"])})
