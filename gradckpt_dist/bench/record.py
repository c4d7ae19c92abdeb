"""What every bench hands out: one JSON object, on stdout and in a file."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gradckpt_dist.version import __version__

Rows = list[dict[str, Any]]


def record(name: str, rows: Rows, **figures: Any) -> dict[str, Any]:
    """The object's common part (``name versions machine command rows``) with this bench's own figures."""
    return {
        "name": name,
        "versions": {"gradckpt_dist": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
        "command": shlex.join(["gradckpt", *sys.argv[1:]]),
        **figures,
        "rows": rows,
    }


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Minimum and median of raw samples (seconds)."""
    return {"minimum_seconds": min(seconds), "median_seconds": statistics.median(seconds)}


def write(result: dict[str, Any], path: Path) -> None:
    """Write the object to a file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def progress(text: str) -> None:
    """One line on stderr; stdout is for the figures."""
    print(text, file=sys.stderr, flush=True)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
