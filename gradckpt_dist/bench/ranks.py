"""Running one function on a few gloo ranks of this machine."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

from gradckpt_dist.errors import GradckptError

Worker = Callable[..., dict[str, Any] | None]


def on_ranks(
    worker: Worker,
    ranks: int,
    *,
    start: str = "spawn",
    environment: Mapping[str, str] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Call ``worker(rank, **arguments)`` in ``ranks`` processes of one thread each; what rank 0 returns.

    ``start`` is how multiprocessing starts them; with ``forkserver`` they share one import of the worker's module.
    ``environment`` is added to their own.

    Raises:
        GradckptError: a rank failed; its traceback is on stderr.
    """
    context: Any = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload([worker.__module__])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_run, args=(worker, rank, ranks, folder, arguments), daemon=True)
            for rank in range(ranks)
        ]
        with _added(environment or {}):
            for process in processes:
                process.start()
        for process in processes:
            process.join()
        failed = [rank for rank, process in enumerate(processes) if process.exitcode]
        if failed:
            raise GradckptError(f"ranks {failed} of the bench failed; see their tracebacks above")
        result: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
        return result


@contextmanager
def _added(environment: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(worker: Worker, rank: int, ranks: int, folder: str, arguments: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        result = worker(rank, **arguments)
    finally:
        # A wrapped model, in a reference cycle, holds the group. If it is the last to drop it, it holds Python's
        # lock meanwhile, for which a thread of gloo's may be waiting that the group waits for (torch 2.13).
        gc.collect()
        dist.destroy_process_group()
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result), encoding="utf-8")
