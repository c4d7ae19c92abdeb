"""One system in a process of its own, which does what its parent asks: a JSON object a line, in and out.

The first line is ``{"setting": …, "size": …, "reference": …}``. Then ``{"do": NAME, …}`` calls a method of ``Worker``.
Each line is answered by one: a result, or ``refused`` with a reason (this system cannot run here), or ``failed`` with
an error. The end of input ends the process.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from gradckpt_dist.bench.frontier import memory
from gradckpt_dist.bench.frontier.models import Workload
from gradckpt_dist.bench.frontier.ours import Ours
from gradckpt_dist.bench.frontier.peers import apply_peer
from gradckpt_dist.bench.frontier.setting import OURS, Setting, Size
from gradckpt_dist.bench.gradients import relative_error
from gradckpt_dist.errors import GradckptError

WARM_UP_STEPS = 2
BYTES_STEPS = 3


class Worker:
    """A workload with a system on it. Its public methods are what a parent may ask for."""

    def __init__(self, setting: Setting, size: Size, *, reference: bool) -> None:
        self._work = Workload(setting.model, size)
        self._reference = self._work.gradients() if reference else []
        self._ours: Ours | None = None
        if setting.system == OURS:
            self._ours = Ours(self._work, compiled=setting.compiled, tolerance=setting.tolerance)
        else:
            apply_peer(self._work, setting)
        if setting.storages:
            self._with_mask().pin(setting.storages)

    def warm_up(self) -> dict[str, Any]:
        """Compile what is to be compiled. ``saved``: a digest of what autograd saved, by which plans can be told."""
        digest = hashlib.sha256()

        def pack(tensor: Tensor) -> Tensor:
            digest.update(repr((tensor.shape, tensor.dtype)).encode())
            return tensor

        for _ in range(WARM_UP_STEPS):
            self._work.step()
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            self._work.step()
        return {"saved": digest.hexdigest()}

    def settle(self, budget: float) -> dict[str, Any]:
        """``storages``: the mask that ours comes to under this budget."""
        return {"storages": self._with_mask().settle(budget)}

    def timed_step(self) -> dict[str, Any]:
        """``seconds`` of one forward and backward. All workers share a core: two need not be as fast as each other."""
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        self._work.zero_gradients()
        started = time.perf_counter()
        self._work.forward().backward()  # type: ignore[no-untyped-call]
        return {"seconds": time.perf_counter() - started}

    def measure(self, storages: Sequence[str]) -> dict[str, Any]:
        """``held_bytes peak_bytes relative_error``: the least of a few steps, and the error of their gradients.

        ``storages`` are pinned before, if there are any.
        """
        if storages:
            self._with_mask().pin(storages)
        for _ in range(WARM_UP_STEPS):
            self._work.step()
        gradients = self._work.gradients()
        error = relative_error(gradients, self._reference)
        del gradients
        samples = [self._bytes_of_step() for _ in range(BYTES_STEPS)]
        held, peak = (min(column) for column in zip(*samples, strict=True))
        return {"held_bytes": held, "peak_bytes": peak, "relative_error": error}

    def _with_mask(self) -> Ours:
        if self._ours is None:
            raise TypeError("only ours has a mask")
        return self._ours

    def _bytes_of_step(self) -> tuple[int, int]:
        self._work.zero_gradients()
        gc.collect()
        before = memory.resident_bytes()
        memory.reset_peak()
        loss = self._work.forward()
        held = memory.resident_bytes() - before
        loss.backward()  # type: ignore[no-untyped-call]
        return held, memory.peak_bytes() - before


def main() -> None:
    """Answer until there is nothing more to read."""
    # What a library prints goes to stderr; the answers have this descriptor to themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if worker is None:
                worker = _build(request)
                answer = worker.warm_up()
            else:
                answer = getattr(worker, request.pop("do"))(**request)
        except GradckptError as error:
            answer = {"refused": f"{type(error).__name__}: {error}"}
        except Exception as error:
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _build(request: dict[str, Any]) -> Worker:
    setting, size = Setting.from_dict(request["setting"]), Size(**request["size"])
    return Worker(setting, size, reference=request["reference"])
