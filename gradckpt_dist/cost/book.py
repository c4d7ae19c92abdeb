"""Costs of storages, gathered on a rank."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Self

from gradckpt_dist.cost.agreed import BLOCK_FIELDS, UNKNOWN, Costs, StorageCost
from gradckpt_dist.cost.clock import DeviceClock, Mark
from gradckpt_dist.storage.ledger import Measurement

SAMPLES = 15
"""The latest ones, of which the median counts."""

RECALLED = 8
"""What a median of before counts for: about the samples that it is made of when training begins."""


@dataclass
class _Samples:
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    extra_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    held_bytes: float = UNKNOWN
    working_set_bytes: float = UNKNOWN
    refused: bool = False
    tokens: int = 0
    met: bool = False
    """Whether the storage has run on this kind, so that it has compiled and allocated what it needs."""

    @classmethod
    def recalled(cls, cost: StorageCost, tokens: int) -> Self:
        """The times of before, per token, from calls of so many ``tokens``."""
        samples = cls(tokens=tokens)
        for times, value in ((samples.seconds, cost.seconds), (samples.extra_seconds, cost.extra_seconds)):
            times.extend([] if value is None else [value] * RECALLED)
        return samples

    def fits(self, tokens: int) -> bool:
        """Whether these are from calls of about this size: costs per token hold within a factor of two."""
        return self.tokens // 2 < tokens <= 2 * self.tokens

    def meet(self, tokens: int, held_bytes: float, working_set_bytes: float) -> None:
        """Bytes per token of a call of so many ``tokens``; times of calls of another size are forgotten."""
        if not self.fits(tokens):
            self.seconds.clear()
            self.extra_seconds.clear()
        self.tokens, self.met = tokens, True
        self.held_bytes, self.working_set_bytes = held_bytes, working_set_bytes

    def vector(self) -> list[float]:
        times = [median(values) if values else UNKNOWN for values in (self.seconds, self.extra_seconds)]
        return [*times, self.held_bytes, self.working_set_bytes, float(self.refused)]


Runs = dict[str, tuple[Mark, Mark]]
"""By storage, the marks before forward and after backward."""


class CostBook:
    """What this rank has measured. ``kinds`` is by block, the number of its kind."""

    def __init__(self, kinds: Sequence[int], storages: Sequence[str], clock: DeviceClock) -> None:
        self._kinds = tuple(kinds)
        self._clock = clock
        self._samples = {(kind, name): _Samples() for kind in range(max(kinds) + 1) for name in storages}
        self._pending: deque[tuple[int, int, Runs]] = deque(maxlen=SAMPLES)
        self._tokens = _Tokens(len(self._kinds))

    def saw_call(self, index: int, tokens: int) -> None:
        """A call of the block at ``index`` in a sampled step."""
        self._tokens.saw_call(index, tokens)

    def end_forward(self) -> None:
        """The model's forward has ended."""
        self._tokens.end_forward()

    def end_step(self) -> None:
        """The sampled step has ended."""
        self._tokens.end_step()

    def knows(self, index: int, storage: str, tokens: int) -> bool:
        """Whether this storage was measured on a block of this kind, in a call of about so many tokens."""
        samples = self._samples[self._kinds[index], storage]
        return samples.refused or (samples.met and samples.fits(tokens))

    def note_bytes(self, index: int, storage: str, tokens: int, measurement: Measurement) -> None:
        """Bytes of one call of ``tokens`` tokens; times of calls of another size are forgotten."""
        held = measurement.stored_bytes[0]
        samples = self._samples[self._kinds[index], storage]
        samples.meet(tokens, held / tokens, (measurement.peak_bytes - held) / tokens)

    def note_runs(self, index: int, tokens: int, runs: Runs) -> None:
        """Times of one probe, ``keep`` among them. They are read when the device has come to their end."""
        self._pending.append((self._kinds[index], tokens, runs))

    def refuse(self, index: int, storage: str) -> None:
        """The storage cannot serve this kind of block."""
        self._samples[self._kinds[index], storage].refused = True

    def refuses(self, index: int, storage: str) -> bool:
        """Whether ``refuse`` was called, or reported for a twin."""
        return self._samples[self._kinds[index], storage].refused

    def restart(self, costs: Costs) -> None:
        """Drop what was gathered, and go on from times that the ranks have agreed on."""
        self._pending.clear()
        examples = {kind: index for index, kind in enumerate(self._kinds)}
        for kind, name in self._samples:
            index = examples[kind]
            self._samples[kind, name] = _Samples.recalled(costs.of(index, name), int(costs.call_tokens[index]))

    def take_maxima(self, forwards_in_flight: int = 1) -> list[float]:
        """This rank's numbers for the MAX all-reduce: [3 x blocks + kinds x storages x 5]."""
        self._read_pending()
        costs = [value for samples in self._samples.values() for value in samples.vector()]
        return [*self._tokens.take(forwards_in_flight), *costs]

    def _read_pending(self) -> None:
        unread: list[tuple[int, int, Runs]] = []
        for kind, tokens, runs in self._pending:
            seconds = {name: self._clock.seconds(*marks) for name, marks in runs.items()}
            known = {name: value / tokens for name, value in seconds.items() if value is not None}
            if len(known) < len(seconds):
                unread.append((kind, tokens, runs))
                continue
            for name, value in known.items():
                self._samples[kind, name].seconds.append(value)
                self._samples[kind, name].extra_seconds.append(value - known["keep"])
        self._pending.clear()
        self._pending.extend(unread)


class _Tokens:
    """Tokens by block: a step's, those of forwards in flight at once, the largest call's. The most over samples."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._step = [0] * blocks
        self._forward = [0] * blocks
        self._most = [[0] * blocks for _ in range(BLOCK_FIELDS)]

    def saw_call(self, index: int, tokens: int) -> None:
        self._step[index] += tokens
        self._forward[index] += tokens
        self._most[2][index] = max(self._most[2][index], tokens)

    def end_forward(self) -> None:
        self._most[1] = [max(pair) for pair in zip(self._most[1], self._forward, strict=True)]
        self._forward = [0] * self._blocks

    def end_step(self) -> None:
        self._most[0] = [max(pair) for pair in zip(self._most[0], self._step, strict=True)]
        self._step = [0] * self._blocks

    def take(self, forwards_in_flight: int) -> list[float]:
        self._most[1] = [forwards_in_flight * tokens for tokens in self._most[1]]
        taken = [float(value) for values in self._most for value in values]
        self._most = [[0] * self._blocks for _ in range(BLOCK_FIELDS)]
        return taken
