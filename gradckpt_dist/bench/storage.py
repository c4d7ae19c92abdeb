"""``gradckpt bench storage``: what each storage holds, costs and changes.

Four blocks of the demo's GPT, a gradient from above that is always the same. All storages run in the same process, a
step each in turn; each shape, precision and kind of block has a process of its own. Compiled blocks go without dropout,
as their selective variants are refused with it. Where there is a GPU, it is measured, with more tokens and more width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradckpt_dist.bench.demo_model import load_text_model
from gradckpt_dist.bench.gradients import relative_error
from gradckpt_dist.bench.quantiser import quantiser_rows
from gradckpt_dist.bench.ranks import on_ranks
from gradckpt_dist.bench.record import progress, record, summary
from gradckpt_dist.cost.clock import DeviceClock
from gradckpt_dist.errors import StorageError
from gradckpt_dist.storage import STORAGES, Storage, StorageContext, create_storage
from gradckpt_dist.storage.ledger import Ledger

DEPTH = 4
HEAD_WIDTH = 64
DROPOUT = 0.1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """One process of the bench. ``dtype`` is a key of ``DTYPES``."""

    d: int
    dtype: str
    compiled: bool
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the bench runs, and how large a step is there."""

    device: torch.device
    batch: int
    context: int
    settings: tuple[Setting, ...]
    steps_ahead: int
    """Steps just before one that is timed, in which the host gets as far ahead of the device as it does in training."""
    quantiser_bytes: int
    quantiser_rounds: int

    @property
    def tokens(self) -> int:
        return self.batch * self.context


_CPU = Place(
    device=torch.device("cpu"),
    batch=8,
    context=128,
    settings=(
        *(
            Setting(d, dtype, compiled=False, rounds=rounds)
            for d, rounds in ((256, 20), (512, 10), (1024, 4))
            for dtype in DTYPES
        ),
        *(Setting(512, dtype, compiled=True, rounds=10) for dtype in DTYPES),
    ),
    steps_ahead=0,
    quantiser_bytes=8 << 20,
    quantiser_rounds=200,
)
"""About a quarter of an hour of one core."""
_QUICK = replace(_CPU, settings=(Setting(256, "fp32", compiled=False, rounds=3),), quantiser_rounds=20)
_GPU = Place(
    device=torch.device("cuda"),
    batch=8,
    context=1024,
    settings=(
        *(Setting(d, "bf16", compiled=False, rounds=10) for d in (1024, 2048, 4096)),
        Setting(4096, "bf16", compiled=True, rounds=10),
    ),
    steps_ahead=2,
    quantiser_bytes=256 << 20,
    quantiser_rounds=20,
)


def bench_storage(*, quick: bool) -> dict[str, Any]:
    """A row for each storage and setting; ``refused``: what serves none, and why; ``quantiser``: its speed.

    Fractions and ratios are to ``keep`` in the same setting. Held bytes are those that autograd and the storage hold
    on the device after forward; peak bytes the most of these in backward, with what a rerun brings back, without
    gradients and temporaries. Ratios are of minima over rounds.
    """
    place = _QUICK if quick else _GPU if torch.cuda.is_available() else _CPU
    rows: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for setting in place.settings:
        progress(f"d={setting.d} {setting.dtype}{' compiled' if setting.compiled else ''}")
        result = on_ranks(_measure, 1, setting=setting, place=place)
        rows += result["rows"]
        refused += result["refused"]
    quantiser = quantiser_rows(place.device, place.quantiser_bytes, place.quantiser_rounds)
    return record(
        "storage",
        rows,
        device=place.device.type,
        tokens=place.tokens,
        blocks=DEPTH,
        refused=refused,
        quantiser=quantiser,
    )


def _measure(rank: int, setting: Setting, place: Place) -> dict[str, Any]:
    stack = _Stack(setting, place)
    of = {"d": setting.d, "dtype": setting.dtype, "compiled": setting.compiled}
    arms: dict[str, _Arm] = {}
    refused = []
    for name in STORAGES:
        try:
            arms[name] = _Arm(name, stack)
        except StorageError as error:
            refused.append({"storage": name, **of, "reason": str(error)})
    for number in range(setting.rounds):
        names = list(arms)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            arms[name].timed_step()
        if setting.rounds > 3:
            progress(f"round {number + 1} of {setting.rounds}")
    return {"rows": [arms[name].row(arms["keep"], of) for name in arms], "refused": refused}


class _Stack:
    """The blocks, their input [batch, context, d] and the gradient of their output."""

    def __init__(self, setting: Setting, place: Place) -> None:
        torch.manual_seed(0)
        model = load_text_model().GPT(
            vocabulary=1,
            context=place.context,
            width=setting.d,
            layers=DEPTH,
            heads=setting.d // HEAD_WIDTH,
            dropout=0.0 if setting.compiled else DROPOUT,
        )
        to: dict[str, Any] = {"device": place.device, "dtype": DTYPES[setting.dtype]}
        self.blocks: list[nn.Module] = list(model.blocks.to(**to))
        if setting.compiled:
            for block in self.blocks:
                block.compile()
        shape = place.batch, place.context, setting.d
        self.input = torch.randn(*shape, **to, requires_grad=True)
        self.output_gradient = torch.randn(*shape, **to)
        self.parameters = [parameter for block in self.blocks for parameter in block.parameters()]
        self.clock = DeviceClock(place.device)
        self.steps_ahead = place.steps_ahead


class _Arm:
    """One storage on all blocks of the stack.

    Raises:
        StorageError: it does not serve them.
    """

    def __init__(self, name: str, stack: _Stack) -> None:
        self._name = name
        self._stack = stack
        context = StorageContext()
        self._storages: list[Storage] = [create_storage(name, block, context) for block in stack.blocks]
        self._forward_seconds: list[float] = []
        self._backward_seconds: list[float] = []
        self._step()
        self._gradients = self._step()
        self._held_bytes, self._peak_bytes = self._count_bytes()

    def timed_step(self) -> None:
        for _ in range(self._stack.steps_ahead):
            self._step()
        clock = self._stack.clock
        started = clock.mark()
        output = self._forward()
        middle = clock.mark()
        self._backward(output)
        end = clock.mark()
        self._forward_seconds.append(clock.wait(started, middle))
        self._backward_seconds.append(clock.wait(middle, end))

    def row(self, keep: _Arm, of: dict[str, Any]) -> dict[str, Any]:
        return {
            "storage": self._name,
            **of,
            "held_fraction": self._held_bytes / keep._held_bytes,
            "peak_fraction": self._peak_bytes / keep._peak_bytes,
            "forward_ratio": min(self._forward_seconds) / min(keep._forward_seconds),
            "backward_ratio": min(self._backward_seconds) / min(keep._backward_seconds),
            "step_ratio": min(self._step_seconds) / min(keep._step_seconds),
            "relative_error": relative_error(self._gradients, keep._gradients),
            "exact": self._storages[0].exact,
            "held_bytes": self._held_bytes,
            "peak_bytes": self._peak_bytes,
            **summary(self._step_seconds),
        }

    @property
    def _step_seconds(self) -> list[float]:
        return [sum(pair) for pair in zip(self._forward_seconds, self._backward_seconds, strict=True)]

    def _step(self) -> list[Tensor]:
        return self._backward(self._forward())

    def _forward(self) -> Tensor:
        torch.manual_seed(1)
        x = self._stack.input
        for storage in self._storages:
            x = storage.run(storage.block, x)
        return x

    def _backward(self, output: Tensor) -> list[Tensor]:
        stack = self._stack
        return list(torch.autograd.grad(output, stack.parameters, stack.output_gradient))

    def _count_bytes(self) -> tuple[int, int]:
        """Held after forward, and the most held at once until the end of backward."""
        torch.manual_seed(1)
        ledger = Ledger(DEPTH)
        ledger.begin_forward()
        x = self._stack.input
        for index, storage in enumerate(self._storages):
            x = ledger.run(index, storage, storage.block, (x,), {})
        ledger.end_forward()
        held_bytes = ledger.live_bytes
        self._backward(x)
        return held_bytes, ledger.measurement().peak_bytes
