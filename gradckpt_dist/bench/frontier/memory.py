"""Resident bytes of this process, from Linux's /proc.

To be read with ``MALLOC_MMAP_THRESHOLD_`` and ``MALLOC_TRIM_THRESHOLD_`` at 65536, so that glibc hands back at once
what a tensor held.
"""

from __future__ import annotations

import re
from pathlib import Path

THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

_RESET_PEAK = "5"


def resident_bytes() -> int:
    """Held now."""
    return _status("VmRSS")


def reset_peak() -> None:
    """Let ``peak_bytes`` begin at what is held now."""
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")


def peak_bytes() -> int:
    """The most held since ``reset_peak``."""
    return _status("VmHWM")


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    match = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/self/status has no field {field}")
    return int(match[1]) * 1024
