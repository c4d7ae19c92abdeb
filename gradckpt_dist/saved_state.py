"""What an engine is saved as, and what of it is not of a form that can be gone on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch

from gradckpt_dist.errors import MaskError
from gradckpt_dist.observer import Window
from gradckpt_dist.schedule import Turn

Totals = tuple[list[float], list[float]]
"""Sums in full, and maxima, over all ranks."""

_AS_TEXT = ("knowledge", "window", "totals")
"""JSON in one text each: torch.distributed.checkpoint takes the keys of nested dicts from the engine that loads."""


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """An engine between two steps, the same on all ranks of its domain.

    ``in_flight`` and ``launched_step`` are of the decision under way, ``totals`` what its all-reduces gave. ``window``
    is what all ranks have gathered since (None if nothing, or if they were not all there to add it up); ``probe_turn``
    counts sampled steps. ``ranks`` is the domain's size.
    """

    version: str
    ranks: int
    blocks: list[str]
    storages: list[str]
    epoch: int
    step: int
    pinned: bool
    theta: float | None
    feasible: bool
    in_flight: str
    launched_step: int
    probe_turn: int
    totals: Totals | None
    window: dict[str, Any] | None
    knowledge: dict[str, Any]
    noise: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the same keys whatever is in them, as torch.distributed.checkpoint needs them."""
        return {name: json.dumps(value) if name in _AS_TEXT else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """What ``to_dict`` gave.

        Raises:
            MaskError: it is something else; the message names what is missing or cannot be read.
        """
        missing = [field.name for field in fields(cls) if field.name not in state]
        if missing:
            raise MaskError(f"the state has no {', '.join(missing)}; give what state_dict() of this version returned")
        values = {field.name: state[field.name] for field in fields(cls)}
        try:
            values |= {name: json.loads(values[name]) for name in _AS_TEXT}
            Turn[values["in_flight"]]
        except (TypeError, ValueError, KeyError, RecursionError) as error:
            raise MaskError(f"the state cannot be read ({error}); give what state_dict() returned") from error
        return cls(**values)

    def require_blocks(self, blocks: Sequence[str]) -> None:
        """Raise MaskError if the state is of other blocks."""
        if list(blocks) != list(self.blocks):
            raise MaskError(
                f"the state is of {len(self.blocks)} blocks {self.blocks[:3]}…, this model has {len(blocks)} blocks "
                f"{list(blocks[:3])}…; load the state of the same model"
            )

    def facts(self) -> dict[str, Any]:
        """What must be equal on all ranks; what is long, by its digest."""
        long = {"blocks", *_AS_TEXT}
        facts = {name: value for name, value in asdict(self).items() if name not in long}
        return facts | {name: _digest(getattr(self, name)) for name in _AS_TEXT}

    def window_for(self, rank: int, ranks: int) -> Window | None:
        """What this rank goes on from, so that it all adds up: the first rank with everything, others with zeros.

        A domain of another size keeps the sums, which are of means, but not the bytes and costs of other processes.
        """
        if self.window is None:
            return None
        window = Window(**self.window | {"sums": torch.tensor(self.window["sums"], dtype=torch.float64, device="cpu")})
        if rank:
            window.sums.zero_()
        if ranks != self.ranks:
            window.maxima.clear()
        return window


def plain(window: Window, totals: Totals) -> dict[str, Any]:
    """The window with sums and maxima over ranks in the place of this rank's own."""
    sums, maxima = totals
    return {"sums": sums, "maxima": maxima, "samples": window.samples, "turn": window.turn}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
