"""What the ranks of a domain have agreed on: impacts and bytes, folded in at each decision, equal on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradckpt_dist.impact import RunningImpact
from gradckpt_dist.mask import Mask
from gradckpt_dist.policy import Evidence
from gradckpt_dist.storage.ledger import Measurement

_SCALARS = 3


class Knowledge:
    """Reads and writes the vectors that travel, and keeps what they taught."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self.running = RunningImpact(blocks)
        self.stored_bytes: dict[str, tuple[int, ...]] = {}
        self.held_bytes = 0
        self.peak_bytes = 0
        self.plugin_seconds = 0.0

    def maxima(self, measurement: Measurement | None, plugin_seconds: float) -> list[float]:
        """This rank's numbers for the MAX all-reduce; zeros where nothing was measured."""
        if measurement is None:
            return [0.0] * (3 * self._blocks + _SCALARS - 1) + [plugin_seconds]
        by_block = (*measurement.keep_bytes, *measurement.recompute_bytes, *measurement.stored_bytes)
        return [*map(float, by_block), float(measurement.held_bytes), float(measurement.peak_bytes), plugin_seconds]

    def update(self, sums: Sequence[float], maxima: Sequence[float], mask: Mask) -> None:
        """Fold in what all ranks sent; ``mask`` was in force while it was measured."""
        self.running.update(sums)
        blocks = self._blocks
        keep, recompute, stored = (tuple(map(int, maxima[i * blocks : (i + 1) * blocks])) for i in range(3))
        held, peak, self.plugin_seconds = maxima[3 * blocks :]
        if not held:
            return
        # A compiled variant does not run what `keep` would: then what was known before stays.
        keep = tuple(new or old for new, old in zip(keep, self.stored_bytes.get("keep", keep), strict=True))
        self.held_bytes, self.peak_bytes = int(held), int(peak)
        self.stored_bytes |= {"keep": keep, "recompute": recompute}
        for name in set(mask.storages) - {"keep", "recompute"}:
            known = self.stored_bytes.get(name, keep)
            self.stored_bytes[name] = tuple(
                stored[i] if used == name else known[i] for i, used in enumerate(mask.storages)
            )

    def evidence(self, current: Mask) -> Evidence:
        """What a policy reads."""
        return Evidence(current=current, impacts=self.running.impacts(), stored_bytes=dict(self.stored_bytes))

    def state_dict(self) -> dict[str, Any]:
        return {
            "mean_square": list(self.running.mean_square),
            "decisions": self.running.decisions,
            "dropped_samples": self.running.dropped_samples,
            "stored_bytes": {name: list(values) for name, values in self.stored_bytes.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.running.mean_square = list(state["mean_square"])
        self.running.decisions = state["decisions"]
        self.running.dropped_samples = state["dropped_samples"]
        self.stored_bytes = {name: tuple(values) for name, values in state["stored_bytes"].items()}
