"""``gradckpt bench storage``: what each storage holds, costs and changes.

Four blocks of the demo's GPT, 1,024 tokens, a gradient from above that is always the same. All storages run in the same
process, a step each in turn; each shape, precision and kind of block has a process of its own. Compiled blocks go
without dropout, as their selective variants are refused with it.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradckpt_dist.bench.demo_model import load_text_model
from gradckpt_dist.bench.gradients import relative_error
from gradckpt_dist.bench.quantiser import quantiser_rows
from gradckpt_dist.bench.ranks import on_ranks
from gradckpt_dist.bench.record import progress, record, summary
from gradckpt_dist.errors import StorageError
from gradckpt_dist.storage import STORAGES, Storage, StorageContext, create_storage
from gradckpt_dist.storage.ledger import Ledger

DEPTH = 4
BATCH = 8
CONTEXT = 128
HEAD_WIDTH = 64
DROPOUT = 0.1
ROUNDS = {256: 20, 512: 10, 1024: 4}
"""By width, such that the whole takes about a quarter of an hour."""
COMPILED_WIDTH = 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """One process of the bench. ``dtype`` is a key of ``DTYPES``."""

    d: int
    dtype: str
    compiled: bool
    rounds: int


def bench_storage(*, quick: bool) -> dict[str, Any]:
    """A row for each storage and setting; ``refused``: what serves none, and why; ``quantiser``: its speed.

    Fractions and ratios are to ``keep`` in the same setting. Held bytes are those that autograd and the storage hold
    on the device after forward; peak bytes the most of these in backward, with what a rerun brings back, without
    gradients and temporaries. Ratios are of minima over rounds.
    """
    if quick:
        settings = [Setting(256, "fp32", compiled=False, rounds=3)]
    else:
        settings = [
            Setting(d, dtype, compiled, rounds)
            for d, rounds in ROUNDS.items()
            for dtype in DTYPES
            for compiled in ((False, True) if d == COMPILED_WIDTH else (False,))
        ]
    rows: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for setting in settings:
        progress(f"d={setting.d} {setting.dtype}{' compiled' if setting.compiled else ''}")
        result = on_ranks(_measure, 1, **asdict(setting))
        rows += result["rows"]
        refused += result["refused"]
    quantiser = quantiser_rows(rounds=20 if quick else 200)
    return record("storage", rows, tokens=BATCH * CONTEXT, blocks=DEPTH, refused=refused, quantiser=quantiser)


def _measure(rank: int, d: int, dtype: str, compiled: bool, rounds: int) -> dict[str, Any]:
    stack = _Stack(d, DTYPES[dtype], compiled=compiled)
    place = {"d": d, "dtype": dtype, "compiled": compiled}
    arms: dict[str, _Arm] = {}
    refused = []
    for name in STORAGES:
        try:
            arms[name] = _Arm(name, stack)
        except StorageError as error:
            refused.append({"storage": name, **place, "reason": str(error)})
    for number in range(rounds):
        names = list(arms)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            arms[name].timed_step()
        if rounds > 3:
            progress(f"round {number + 1} of {rounds}")
    return {"rows": [arms[name].row(arms["keep"], place) for name in arms], "refused": refused}


class _Stack:
    """The blocks, their input [batch, context, d] and the gradient of their output."""

    def __init__(self, d: int, dtype: torch.dtype, *, compiled: bool) -> None:
        torch.manual_seed(0)
        dropout = 0.0 if compiled else DROPOUT
        model = load_text_model().GPT(
            vocabulary=1, context=CONTEXT, width=d, layers=DEPTH, heads=d // HEAD_WIDTH, dropout=dropout
        )
        self.blocks: list[nn.Module] = list(model.blocks.to(dtype))
        if compiled:
            for block in self.blocks:
                block.compile()
        self.input = torch.randn(BATCH, CONTEXT, d, dtype=dtype, requires_grad=True)
        self.output_gradient = torch.randn(BATCH, CONTEXT, d, dtype=dtype)
        self.parameters = [parameter for block in self.blocks for parameter in block.parameters()]


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
        started = time.perf_counter()
        output = self._forward()
        middle = time.perf_counter()
        self._backward(output)
        self._forward_seconds.append(middle - started)
        self._backward_seconds.append(time.perf_counter() - middle)

    def row(self, keep: _Arm, place: dict[str, Any]) -> dict[str, Any]:
        return {
            "storage": self._name,
            **place,
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
