"""What is looked at in a sampled step: impact; bytes, in a measured one; one block closely, at a probe's turn.

Where there are probes, impact is what carries them to other steps and blocks: it is gathered with them, and in measured
steps. The other sampled steps count tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradckpt_dist.impact import Impact
from gradckpt_dist.peaks import StepPeaks
from gradckpt_dist.probing import Prober, ProbeTurn
from gradckpt_dist.storage import Forward, Storage
from gradckpt_dist.storage.ledger import Ledger, Measurement


class Sampler:
    """The watch of one engine's blocks, from ``begin`` to ``end``."""

    def __init__(self, impact: Impact, peaks: StepPeaks, prober: Prober | None = None) -> None:
        self._impact = impact
        self._peaks = peaks
        self._prober = prober
        self._ledger: Ledger | None = None
        self.gathers_impact = False
        """Whether it is gathered in the step under way."""

    def begin(self, *, measured: bool, turns: Sequence[ProbeTurn] = ()) -> None:
        """Start a sampled step; ``measured`` counts bytes too, where saved-tensor hooks are allowed."""
        self._ledger = Ledger(self._impact.blocks) if measured and Ledger.available() else None
        self.gathers_impact = measured or bool(turns) or self._prober is None
        if self._prober is not None:
            self._prober.begin(turns)

    def begin_forward(self) -> None:
        if self._ledger is not None:
            self._ledger.begin_forward()

    def end_forward(self) -> None:
        if self._ledger is not None:
            self._ledger.end_forward()
        if self._prober is not None:
            self._prober.end_forward()

    def spoil(self) -> None:
        """The step's gradients were thrown away, as its loss scale was too high: it teaches nothing."""
        if self.gathers_impact:
            self._impact.spoil()

    def end(self) -> Measurement | None:
        """Close the sampled step; its bytes if it was measured."""
        if self._prober is not None:
            self._prober.end(self._impact)
        if self.gathers_impact:
            self._impact.end_step()
        ledger, self._ledger = self._ledger, None
        return ledger.measurement() if ledger is not None else None

    def reruns(self, index: int) -> bool:
        """Whether the block's coming call will be run again for a probe."""
        return self._prober is not None and self._prober.reruns(index)

    def __call__(self, index: int, storage: Storage, forward: Forward, args: Any, kwargs: Any) -> Any:
        call = self._prober.before(index, forward, args, kwargs) if self._prober is not None else None
        if self._ledger is None:
            output = storage.run(forward, *args, **kwargs)
        else:
            output = self._ledger.run(index, storage, forward, args, kwargs)
            if index == self._impact.blocks - 1:
                self._peaks.leave_blocks(output)
        if self._prober is not None:
            self._prober.after(index, call, output)
        if self.gathers_impact:
            self._impact.watch(index, output, (args, kwargs))
        return output
