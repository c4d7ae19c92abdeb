"""How fast the quantiser is, as a fraction of this machine's own memory-copy speed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gradckpt_dist.bench.ranks import on_ranks
from gradckpt_dist.bench.record import progress, summary
from gradckpt_dist.cost.clock import DeviceClock
from gradckpt_dist.storage.noise import NoiseSource
from gradckpt_dist.storage.quantiser import Quantised, dequantise, quantise

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def quantiser_rows(device: torch.device, tensor_bytes: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each type, width and direction, on tensors of so many bytes.

    Fractions are bytes read plus written a second, over those of a copy in the same rounds; both of minima.
    """
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES:
        progress(f"quantiser {dtype}")
        rows += on_ranks(_measure, 1, device=device, dtype=dtype, tensor_bytes=tensor_bytes, rounds=rounds)["rows"]
    return rows


def _measure(rank: int, device: torch.device, dtype: str, tensor_bytes: int, rounds: int) -> dict[str, Any]:
    clock = DeviceClock(device)
    x = torch.randn(tensor_bytes // DTYPES[dtype].itemsize, device=device).to(DTYPES[dtype])
    target = torch.empty_like(x)
    noise = NoiseSource()
    calls: dict[tuple[int, str], Callable[[], Any]] = {}
    moved_bytes: dict[tuple[int, str], int] = {}
    for bits in (8, 6, 4):
        quantised = _quantised(x, bits, noise)
        calls[bits, "quantise"] = partial(quantise, x, bits, noise)
        calls[bits, "dequantise"] = partial(dequantise, quantised)
        moved_bytes[bits, "quantise"] = moved_bytes[bits, "dequantise"] = x.nbytes + quantised.size_bytes
    copies: list[float] = []
    samples: dict[tuple[int, str], list[float]] = {key: [] for key in calls}
    for number in range(rounds + 1):
        copied = _seconds(clock, partial(target.copy_, x))
        taken = {key: _seconds(clock, call) for key, call in calls.items()}
        if number > 0:  # the first round compiles
            copies.append(copied)
            for key, seconds in taken.items():
                samples[key].append(seconds)
    copy_speed = 2 * x.nbytes / min(copies)
    rows = [
        {
            "bits": bits,
            "dtype": dtype,
            "direction": direction,
            "fraction_of_memory_copy": moved_bytes[bits, direction] / min(seconds) / copy_speed,
            **summary(seconds),
        }
        for (bits, direction), seconds in samples.items()
    ]
    return {"rows": rows}


def _quantised(x: torch.Tensor, bits: int, noise: NoiseSource) -> Quantised:
    quantised = quantise(x, bits, noise)
    if quantised is None:
        raise RuntimeError("a normal sample was not finite")
    return quantised


def _seconds(clock: DeviceClock, call: Callable[[], Any]) -> float:
    started = clock.mark()
    call()
    return clock.wait(started, clock.mark())
