"""``gradckpt bench scale``: what a decision's agreement sends and takes on 2 to 32 real ranks, and on 16,384 simulated.

Real ranks are processes of this machine under gloo, whatever the number of its cores: bytes and collectives are exact,
seconds are those of so many processes on so few cores.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from gradckpt_dist.agreement import Decision
from gradckpt_dist.agreement.collectives import GroupAgreement
from gradckpt_dist.agreement.wire import message_bytes
from gradckpt_dist.bench.ranks import on_ranks
from gradckpt_dist.bench.record import progress, record
from gradckpt_dist.bench.scale_model import Network, sent_bytes, simulate
from gradckpt_dist.config import Config
from gradckpt_dist.knowledge import Scope
from gradckpt_dist.mask import Mask
from gradckpt_dist.observer import Observer, probe_schedule
from gradckpt_dist.storage import StorageContext

BLOCKS = 126
INTERVAL = 50
STEP_SECONDS = 1.0
SIMULATED_RANKS = (32, 512, 4096, 16_384)
_REAL_STEP_SECONDS = 0.1
_WARM_UPS = 2
_FLOAT64_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class _Extent:
    ranks: tuple[int, ...]
    decisions: int
    simulated_decisions: int


_FULL = _Extent(ranks=(2, 4, 8, 16, 32), decisions=50, simulated_decisions=200)
_QUICK = _Extent(ranks=(2, 4), decisions=3, simulated_decisions=5)


def bench_scale(*, quick: bool) -> dict[str, Any]:
    """Rows ``ranks blocks wire_bytes collectives exposed_seconds cpu_seconds simulated …``, by decision and rank.

    ``wire_bytes`` is what one rank sends at most, ``payload_bytes`` what it hands to collectives. ``exposed_seconds``
    is what the host spends in the agreement, waiting included, median on rank 0, and ``cpu_seconds`` that thread's CPU
    time of it, which leaves out the wait for a core (real); or the mean wait of the rank that waits longest, plus
    ``host_seconds``, the largest median of as many real ranks as have a core each (simulated). ``hidden_seconds`` is
    what passes beside training steps: of the collectives' own time (simulated), or from launch to receipt (real).
    """
    extent = _QUICK if quick else _FULL
    rows = []
    for ranks in extent.ranks:
        progress(f"{ranks} ranks")
        rows.append(on_ranks(_measure, ranks, start="forkserver", decisions=extent.decisions))
    host_seconds = _host_seconds(rows)
    sums, maxima = _vectors()
    payload = _FLOAT64_BYTES * (len(sums) + len(maxima) + 4)
    generator = np.random.default_rng(0)
    for ranks in SIMULATED_RANKS:
        for algorithm in ("tree", "ring"):
            progress(f"{ranks} simulated ranks, {algorithm}")
            rows.append(_simulated(algorithm, ranks, payload, host_seconds, extent.simulated_decisions, generator))
    return record(
        "scale",
        rows,
        interval=INTERVAL,
        step_seconds=STEP_SECONDS,
        host_seconds=host_seconds,
        sums=len(sums),
        maxima=len(maxima) + 4,
        wire_bytes_all_kinds_differ=_all_kinds_differ(),
    )


def _host_seconds(rows: Sequence[dict[str, Any]]) -> float:
    """The largest median over rows of ranks that do not share cores; on one core, of the fewest ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = max(cores, rows[0]["ranks"])
    return max(float(row["exposed_seconds"]) for row in rows if row["ranks"] <= ranks)


def _simulated(
    algorithm: str, ranks: int, payload: int, host_seconds: float, decisions: int, generator: np.random.Generator
) -> dict[str, Any]:
    waits = simulate(
        algorithm,
        ranks,
        (("reduce", payload), ("broadcast", message_bytes(BLOCKS))),
        network=Network(),
        step_seconds=STEP_SECONDS,
        decisions=decisions,
        generator=generator,
    )
    return {
        "ranks": ranks,
        "blocks": BLOCKS,
        "wire_bytes": sent_bytes(payload, message_bytes(BLOCKS), ranks),
        "payload_bytes": payload + message_bytes(BLOCKS),
        "collectives": 3,
        "exposed_seconds": host_seconds + float(waits.exposed_seconds.mean()),
        "least_exposed_seconds": host_seconds + float(waits.exposed_seconds.min()),
        "worst_exposed_seconds": host_seconds + float(waits.exposed_seconds.max()),
        "cpu_seconds": None,
        "hidden_seconds": float((waits.collective_seconds - waits.exposed_seconds).mean()),
        "simulated": True,
        "algorithm": algorithm,
    }


def _measure(rank: int, decisions: int) -> dict[str, Any]:
    sums, maxima = _vectors()
    agreement = GroupAgreement(range(dist.get_world_size()), torch.device("cpu"), timeout_seconds=120)
    mask = Mask(blocks=tuple(f"layers.{index}" for index in range(BLOCKS)), storages=("recompute",) * BLOCKS)
    counter, training = _Collectives(), _Training()
    exposed: list[float] = []
    cpu: list[float] = []
    whole: list[float] = []
    for step in range(_WARM_UPS + decisions):
        if step == _WARM_UPS:
            counter.reset()
            exposed, cpu, whole = [], [], []
        turn = _Turn(agreement, training, mask, step)
        training.step()
        dist.barrier()
        started = time.perf_counter()
        mask = turn.take(sums.clone(), maxima)
        whole.append(time.perf_counter() - started)
        exposed.append(turn.exposed_seconds)
        cpu.append(turn.cpu_seconds)
    counter.restore()
    agreement.close()
    ranks, payload = dist.get_world_size(), _FLOAT64_BYTES * (len(sums) + len(maxima) + 4)
    return {
        "ranks": ranks,
        "blocks": BLOCKS,
        "wire_bytes": sent_bytes(payload, message_bytes(BLOCKS), ranks),
        "payload_bytes": counter.bytes // decisions,
        "collectives": counter.calls // decisions,
        "exposed_seconds": statistics.median(exposed),
        "least_exposed_seconds": min(exposed),
        "worst_exposed_seconds": max(exposed),
        "cpu_seconds": statistics.median(cpu),
        "hidden_seconds": statistics.median(whole) - statistics.median(exposed),
        "simulated": False,
        "algorithm": "gloo",
    }


class _Training:
    """Stands in for training between two boundaries: a host that waits for its device, then has work to give to torch.

    A host that has only slept would find none of its code in the caches, as it does in no training.
    """

    def __init__(self) -> None:
        self._model = nn.TransformerEncoderLayer(128, nhead=4, dim_feedforward=256, dropout=0.0, batch_first=True)
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        self._batch = torch.randn(2, 64, 128)

    def step(self) -> None:
        time.sleep(_REAL_STEP_SECONDS)
        self._model(self._batch).square().mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


class _Turn:
    """One decision, and the training meanwhile."""

    def __init__(self, agreement: GroupAgreement, training: _Training, mask: Mask, step: int) -> None:
        self._agreement = agreement
        self._training = training
        self._mask = mask
        self._step = step
        self.exposed_seconds = self.cpu_seconds = 0.0

    def take(self, sums: torch.Tensor, maxima: list[float]) -> Mask:
        agreement, epoch = self._agreement, self._mask.epoch
        self._spend(lambda: agreement.launch(sums, maxima, self._step, epoch))
        self._training.step()
        self._spend(agreement.collect)
        decision = self._decision()
        self._spend(lambda: agreement.announce(decision, BLOCKS, self._step))
        self._training.step()
        received: Decision = self._spend(lambda: agreement.receive(self._mask.blocks, epoch))
        return received.mask

    def _decision(self) -> Decision | None:
        if self._agreement.rank:
            return None
        storages = [("keep", "recompute")[(self._step + block) % 2] for block in range(BLOCKS)]
        return Decision(mask=self._mask.replaced(storages), step=self._step, theta=0.5)

    def _spend(self, call: Callable[[], Any]) -> Any:
        started, cpu_started = time.perf_counter(), time.thread_time()
        result = call()
        self.exposed_seconds += time.perf_counter() - started
        self.cpu_seconds += time.thread_time() - cpu_started
        return result


class _Collectives:
    """Counts calls of torch.distributed's collectives, and the bytes they are given."""

    def __init__(self) -> None:
        self.calls = self.bytes = 0
        self._real = {name: getattr(dist, name) for name in ("all_reduce", "broadcast")}
        for name, call in self._real.items():
            setattr(dist, name, self._counted(call))

    def reset(self) -> None:
        self.calls = self.bytes = 0

    def restore(self) -> None:
        for name, call in self._real.items():
            setattr(dist, name, call)

    def _counted(self, call: Any) -> Any:
        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.bytes += tensor.numel() * tensor.element_size()
            return call(tensor, *args, **kwargs)

        return counted


def _vectors(kinds: int = 1) -> tuple[torch.Tensor, list[float]]:
    """What a rank sends for ``BLOCKS`` blocks of so many kinds, all storages on offer."""
    modules: list[nn.Module] = [nn.Linear(1 + index % kinds, 1) for index in range(BLOCKS)]
    scope = Scope.of(modules, Config(gradient_tolerance=0.05, interval=INTERVAL))
    turns = probe_schedule(scope, INTERVAL)
    observer = Observer(modules, scope, torch.device("cpu"), StorageContext(), turns)
    observer.attach(nn.ModuleList(modules))
    maxima = observer.take_maxima(0.0)
    return observer.take_sums(), maxima


def _all_kinds_differ() -> int:
    """Bytes sent by one of many ranks if no two blocks are alike: costs are by kind."""
    sums, maxima = _vectors(kinds=BLOCKS)
    payload = _FLOAT64_BYTES * (len(sums) + len(maxima) + 4)
    return sent_bytes(payload, message_bytes(BLOCKS), SIMULATED_RANKS[-1])
