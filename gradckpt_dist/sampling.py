"""What is looked at in a sampled step: impact always, bytes in the steps that are measured too."""

from __future__ import annotations

from typing import Any

from gradckpt_dist.impact import Impact
from gradckpt_dist.storage import Forward, Storage
from gradckpt_dist.storage.ledger import Ledger, Measurement


class Sampler:
    """The watch of one engine's blocks, from ``begin`` to ``end``."""

    def __init__(self, impact: Impact) -> None:
        self._impact = impact
        self._ledger: Ledger | None = None

    def begin(self, *, measured: bool) -> None:
        """Start a sampled step; ``measured`` counts bytes too, where saved-tensor hooks are allowed."""
        self._ledger = Ledger(self._impact.blocks) if measured and Ledger.available() else None

    def begin_forward(self) -> None:
        if self._ledger is not None:
            self._ledger.begin_forward()

    def end_forward(self) -> None:
        if self._ledger is not None:
            self._ledger.end_forward()

    def end(self) -> Measurement | None:
        """Close the sampled step; its bytes if it was measured."""
        self._impact.end_step()
        ledger, self._ledger = self._ledger, None
        return ledger.measurement() if ledger is not None else None

    def __call__(self, index: int, storage: Storage, forward: Forward, args: Any, kwargs: Any) -> Any:
        if self._ledger is None:
            output = storage.run(forward, *args, **kwargs)
        else:
            output = self._ledger.run(index, storage, forward, args, kwargs)
        self._impact.watch(index, output)
        return output
