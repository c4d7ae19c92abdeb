"""Resident bytes of this process, from Linux's /proc, and the environments in which glibc's allocator is predictable.

Left to itself it moves its thresholds with what has been freed so far, and hands memory back to the system and faults
it in again or not, as luck has it.
"""

from __future__ import annotations

import re
from pathlib import Path

HANDS_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""What a tensor held goes back to the system at once, so that resident bytes tell what is held."""

KEEPS = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Nothing goes back, as with accelerators' allocators, and pages are huge: no page faults in a step that is timed."""

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
