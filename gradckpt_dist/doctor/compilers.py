"""Which compilers torch.compile would use here."""

from __future__ import annotations

import importlib.util
import subprocess
from dataclasses import dataclass
from functools import cache

import torch

_TIMEOUT_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """``found`` says which one; None where there is none, and then ``advice`` is what to do."""

    device: str
    found: str | None
    advice: str = ""


@cache
def compilers() -> tuple[Compiler, ...]:
    """For the CPU, and for CUDA where there is a device."""
    return (_host(), _cuda()) if torch.cuda.is_available() else (_host(),)


def _host() -> Compiler:
    """The first C++ compiler that answers, of those that inductor tries."""
    from torch._inductor import config  # noqa: PLC0415

    for name in filter(None, config.cpp.cxx):  # None: to be downloaded, which nobody has asked for here
        if (line := _version_line(name)) is not None:
            return Compiler(device="cpu", found=line)
    return Compiler(device="cpu", found=None, advice="install g++ (Debian: apt install g++), or name one in CXX")


def _cuda() -> Compiler:
    if importlib.util.find_spec("triton") is None:
        return Compiler(device="cuda", found=None, advice="pip install triton, in the version that torch asks for")
    import triton  # noqa: PLC0415

    return Compiler(device="cuda", found=f"triton {triton.__version__}")


def _version_line(command: str) -> str | None:
    try:
        done = subprocess.run(
            [command, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), command)
