"""``gradckpt bench overhead``: what the plugin itself costs.

Pairs of replicas of the demo model train in the same processes, a step each in turn: one with the whole loop on, one
with the same mask pinned, which samples, measures and agrees on nothing. In the pair ``norm`` a static policy keeps
the mask, and impact is the gradient norm; in the pair ``probe`` the budget policy decides, with lossy storages. As in
the frontier bench, glibc keeps what tensors held: else replicas differ by what it faults in again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from gradckpt_dist.api import enable
from gradckpt_dist.bench.demo_model import load_text_model
from gradckpt_dist.bench.frontier.memory import KEEPS
from gradckpt_dist.bench.ranks import on_ranks
from gradckpt_dist.bench.record import progress, record, summary

RANKS = 2
INTERVAL = 50
_POLICIES: dict[str, dict[str, Any]] = {
    "norm": {"policy": "static", "every_n": 2},
    "probe": {"policy": "budget", "memory_budget": 0.3, "gradient_tolerance": 0.05},
}
_INTERVALS_TO_SETTLE = 4


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the model, its batch and the run."""

    width: int
    batch: int
    interval: int
    rounds: int
    pairs: tuple[str, ...] = tuple(_POLICIES)


_SMALL = Size(width=128, batch=8, interval=INTERVAL, rounds=8)
_WIDE = replace(_SMALL, width=512, rounds=3, pairs=("probe",))
_QUICK = Size(width=128, batch=2, interval=8, rounds=1)


def bench_overhead(*, quick: bool) -> dict[str, Any]:
    """Figures ``overhead_fraction steps ranks interval``, of the pair ``norm``, and for the other pair ``probe_…``.

    ``overhead_fraction`` is the seconds added over an interval divided by the pinned replica's: steps are compared by
    their place in the interval, each the minimum over rounds. ``cpu_fraction`` is the same of CPU seconds of rank 0,
    summed over all steps, so that what does not happen in every interval counts. ``plugin_fraction`` is what the
    plugin's own clock at boundaries says, ``probing_fraction`` what the one around probes does.
    """
    return _bench(_QUICK if quick else _SMALL)


def bench_overhead_wide(*, quick: bool) -> dict[str, Any]:
    """The pair ``probe`` at d = 512: what the loop does by itself takes as long, and training steps take longer."""
    return _bench(_QUICK if quick else _WIDE)


def _bench(size: Size) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for pair in size.pairs:
        progress(f"pair {pair}")
        result = on_ranks(_measure, RANKS, environment=KEEPS, size=size, pair=pair)
        rows += result.pop("rows")
        prefix = "" if pair == "norm" else f"{pair}_"
        figures |= {f"{prefix}{name}": value for name, value in result.items()}
    steps = size.rounds * size.interval
    return record("overhead", rows, **figures, d=size.width, steps=steps, ranks=RANKS, interval=size.interval)


def _measure(rank: int, size: Size, pair: str) -> dict[str, Any]:
    plugin, pinned = (_Replica(size, _POLICIES[pair]) for _ in range(2))
    pinned.engine.set_mask(pinned.engine.mask.storages)
    plugin.warm_up(_INTERVALS_TO_SETTLE)
    pinned.warm_up(1)
    plugin_seconds, probing_seconds = plugin.engine.stats()["plugin_seconds"], plugin.probing_seconds
    for number in range(size.rounds):
        for place in range(size.interval):
            if pinned.engine.mask.storages != plugin.engine.mask.storages:
                pinned.engine.set_mask(plugin.engine.mask.storages)
            for replica in (plugin, pinned) if (number + place) % 2 else (pinned, plugin):
                replica.timed_step()
        if rank == 0:
            progress(f"round {number + 1} of {size.rounds}")
    plugin_seconds = plugin.engine.stats()["plugin_seconds"] - plugin_seconds
    probing_seconds = plugin.probing_seconds - probing_seconds
    return {
        "overhead_fraction": plugin.best_interval_seconds() / pinned.best_interval_seconds() - 1,
        "cpu_fraction": sum(plugin.cpu_seconds) / sum(pinned.cpu_seconds) - 1,
        "plugin_fraction": plugin_seconds / sum(pinned.seconds),
        "probing_fraction": probing_seconds / sum(pinned.seconds),
        "rows": [
            {"pair": pair, "replica": name, **summary(replica.seconds), "cpu_seconds": sum(replica.cpu_seconds)}
            for name, replica in (("plugin", plugin), ("pinned", pinned))
        ],
    }


@dataclass
class _Replica:
    """The demo model under DDP with an engine of its own."""

    size: Size
    policy: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        module = load_text_model()
        torch.manual_seed(0)
        text = module.read_text(None)
        width = self.size.width
        model = module.GPT(
            vocabulary=text.vocabulary, context=128, width=width, layers=6, heads=max(4, width // 64), dropout=0.1
        )
        self._model = DistributedDataParallel(model)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self._windows = text.sample(self.size.batch, 128, torch.Generator().manual_seed(dist.get_rank()))
        config = {**self.policy, "interval": self.size.interval, "warmup_steps": 0}
        self.engine = enable(self._model, config, optimizer=self._optimizer)

    @property
    def probing_seconds(self) -> float:
        """So far."""
        prober = self.engine._observer.prober
        return 0.0 if prober is None else prober.seconds

    def timed_step(self) -> None:
        started, cpu_started = time.perf_counter(), time.process_time()
        self._step()
        self.seconds.append(time.perf_counter() - started)
        self.cpu_seconds.append(time.process_time() - cpu_started)

    def warm_up(self, intervals: int) -> None:
        for _ in range(intervals * self.size.interval):
            self._step()

    def best_interval_seconds(self) -> float:
        """Of an interval, each step at its best."""
        interval = self.size.interval
        return sum(min(self.seconds[place::interval]) for place in range(interval))

    def _step(self) -> None:
        self._optimizer.zero_grad()
        logits = self._model(self._windows[:, :-1])
        loss = functional.cross_entropy(logits, self._windows[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
