"""``gradckpt bench overhead``: what the plugin itself costs.

Two replicas of the demo model train in the same processes, a step each in turn: one with the whole loop on (a static
policy, so that its mask stays), one with that mask pinned, which samples, measures and agrees on nothing. Steps are
compared by their place in the interval, each the minimum over rounds.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from gradckpt_dist.api import enable
from gradckpt_dist.bench.demo_model import load_text_model
from gradckpt_dist.bench.ranks import on_ranks
from gradckpt_dist.bench.record import progress, record, summary

RANKS = 2
INTERVAL = 50
_POLICY = {"policy": "static", "every_n": 2, "interval": INTERVAL, "warmup_steps": 0}


def bench_overhead(*, quick: bool) -> dict[str, Any]:
    """Figures ``overhead_fraction steps ranks interval``; a row for each of the two replicas.

    ``overhead_fraction`` is the seconds added over an interval divided by the pinned replica's seconds;
    ``plugin_fraction``, what the plugin's own clock at boundaries says, divided by the same.
    """
    rounds, batch = (1, 2) if quick else (8, 8)
    result = on_ranks(_measure, RANKS, rounds=rounds, batch=batch)
    return record("overhead", result.pop("rows"), **result)


def _measure(rank: int, rounds: int, batch: int) -> dict[str, Any]:
    replicas = {"plugin": _Replica(batch, pinned=False), "pinned": _Replica(batch, pinned=True)}
    for replica in replicas.values():
        replica.run_to_first_decision()
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in range(INTERVAL)] for name in replicas}
    plugin_seconds = replicas["plugin"].engine.stats()["plugin_seconds"]
    for number in range(rounds):
        for place in range(INTERVAL):
            order = list(replicas) if (number + place) % 2 else list(reversed(replicas))
            for name in order:
                seconds[name][place].append(replicas[name].timed_step())
        if rank == 0:
            progress(f"round {number + 1} of {rounds}")
    plugin_seconds = replicas["plugin"].engine.stats()["plugin_seconds"] - plugin_seconds
    best = {name: sum(min(samples) for samples in places) for name, places in seconds.items()}
    rows = [
        {"replica": name, **summary([sample for samples in places for sample in samples])}
        for name, places in seconds.items()
    ]
    return {
        "overhead_fraction": best["plugin"] / best["pinned"] - 1,
        "plugin_fraction": plugin_seconds / rounds / best["pinned"],
        "steps": rounds * INTERVAL,
        "ranks": RANKS,
        "interval": INTERVAL,
        "rows": rows,
    }


class _Replica:
    """The demo model under DDP with an engine of its own."""

    def __init__(self, batch: int, *, pinned: bool) -> None:
        module = load_text_model()
        torch.manual_seed(0)
        text = module.read_text(None)
        model = module.GPT(vocabulary=text.vocabulary, context=128, width=128, layers=6, heads=4, dropout=0.1)
        self._model = DistributedDataParallel(model)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self._windows = text.sample(batch, 128, torch.Generator().manual_seed(dist.get_rank()))
        self.engine = enable(self._model, _POLICY, optimizer=self._optimizer)
        if pinned:
            self.engine.set_mask(self.engine.mask.storages)

    def timed_step(self) -> float:
        started = time.perf_counter()
        self._optimizer.zero_grad()
        logits = self._model(self._windows[:, :-1])
        loss = functional.cross_entropy(logits, self._windows[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return time.perf_counter() - started

    def run_to_first_decision(self) -> None:
        """Warm up, and come to the start of an interval."""
        for _ in range(INTERVAL):
            self.timed_step()
