"""What is installed here, and what of this package will work with it; nothing of a framework is imported."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from gradckpt_dist.adapters import versions
from gradckpt_dist.api import CONFIG_VARIABLE, resolve_config
from gradckpt_dist.doctor.compilers import Compiler, compilers
from gradckpt_dist.errors import ConfigError
from gradckpt_dist.memory import host_bytes, memory_meter
from gradckpt_dist.storage import STORAGES
from gradckpt_dist.version import __version__


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Whether a part of this package ``works`` here (``yes``, ``slowly`` or ``no``), and why, or what to do."""

    part: str
    works: str
    why: str = ""


WAYS_IN = {
    "accelerate": "gradckpt accelerate launch",
    "deepspeed": "DeepSpeed JSON",
    "transformers": "transformers Trainer",
    "torchtitan": "torchtitan GradckptAC",
}


def diagnose() -> dict[str, Any]:
    """One object that JSON can hold: ``name versions machine frameworks compilers findings``.

    Bytes are those of this machine or container; ``findings`` has ``part works why``, as ``Finding``.
    """
    return {
        "name": "doctor",
        "versions": {"gradckpt_dist": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "memory_bytes": host_bytes(),
            "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
        "frameworks": [_framework(name) for name in versions.FRAMEWORKS],
        "compilers": [asdict(compiler) for compiler in compilers()],
        "findings": [asdict(finding) for finding in _findings()],
    }


def _framework(name: str) -> dict[str, Any]:
    installed = versions.installed_version(name)
    note = versions.missing(name) if installed is None else versions.untested(name)
    return {"name": name, "version": installed, "tested": versions.FRAMEWORKS[name].tested, "note": note or ""}


def _findings() -> Iterator[Finding]:
    compiler = compilers()[-1]
    yield from _storages(compiler)
    yield from _memory()
    yield _ranks()
    for framework, way in WAYS_IN.items():
        yield _way_in(way, framework)
    yield _configuration()


def _storages(compiler: Compiler) -> Iterator[Finding]:
    plain = [name for name, storage in STORAGES.items() if storage.exact and name != "offload"]
    yield Finding(part=" ".join(plain), works="yes", why="exact")
    lossy = " ".join(name for name, storage in STORAGES.items() if not storage.exact)
    if compiler.found is None:
        why = f"without a compiler they run in eager PyTorch, slower than recomputing; {compiler.advice}"
        yield Finding(part=lossy, works="slowly", why=why)
        yield Finding(part="blocks under torch.compile", works="no", why=compiler.advice)
    else:
        yield Finding(part=lossy, works="yes", why=f"with a gradient_tolerance; compiled by {compiler.found}")
        yield Finding(part="blocks under torch.compile", works="yes")
    if torch.cuda.is_available():
        yield Finding(part="offload", works="yes", why="to pinned host memory")
    else:
        yield Finding(part="offload", works="yes", why="but there is no device here whose memory it would save")


def _memory() -> Iterator[Finding]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    meter = memory_meter(device)
    available = meter.available_bytes() / 2**30
    yield Finding(part="memory_budget: auto", works="yes", why=f"{available:.1f} GiB for this process on the {device}")
    meter.begin()
    if device.type != "cpu" or meter.peak_bytes():  # an allocator that has handed out nothing tells 0
        yield Finding(part="memory_budget in bytes", works="yes")
    else:
        why = "this system does not tell a process its peak; give a fraction"
        yield Finding(part="memory_budget in bytes", works="no", why=why)


def _ranks() -> Finding:
    if not dist.is_available():
        return Finding(part="several ranks", works="no", why="this torch was built without torch.distributed")
    known = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    return Finding(part="several ranks", works="yes", why=", ".join(name for name, found in known.items() if found))


def _way_in(way: str, framework: str) -> Finding:
    if versions.installed_version(framework) is None:
        return Finding(part=way, works="no", why=versions.missing(framework))
    return Finding(part=way, works="yes", why=versions.untested(framework) or "")


def _configuration() -> Finding:
    path = os.environ.get(CONFIG_VARIABLE)
    try:
        resolve_config(None)
    except ConfigError as error:
        return Finding(part=CONFIG_VARIABLE, works="no", why=str(error))
    return Finding(part=CONFIG_VARIABLE, works="yes", why=path or "not set: the defaults")
