"""What this process uses, and what it may."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradckpt_dist import memory
from gradckpt_dist.memory import HostMeter, memory_meter

MIB = 2**20
CPU = torch.device("cpu")


def test_the_peak_is_that_since_begin() -> None:
    meter = memory_meter(CPU)
    meter.begin()
    before = meter.peak_bytes()
    block = torch.ones(64 * MIB, dtype=torch.uint8)
    with_block = meter.peak_bytes()
    assert with_block - before >= 60 * MIB
    del block
    assert meter.peak_bytes() == pytest.approx(with_block, abs=MIB)  # the kernel counts in batches of pages
    meter.begin()
    assert meter.peak_bytes() < with_block - 30 * MIB


def test_ranks_of_a_host_share_what_is_free_and_each_has_what_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = HostMeter()
    alone = meter.available_bytes()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    shared = meter.available_bytes()
    assert 0 < shared < alone <= memory.host_bytes()
    used = memory._kibibytes(Path("/proc/self/status"), "VmRSS") << 10
    assert shared - used == pytest.approx((alone - used) / 4, rel=0.2)


def test_a_container_has_its_own_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    limit.write_text("1000000\n")
    used.write_text("400000\n")
    monkeypatch.setattr(memory, "_CGROUP_LIMIT", limit)
    monkeypatch.setattr(memory, "_CGROUP_USED", used)
    assert memory.host_bytes() == 1_000_000
    own = memory._kibibytes(Path("/proc/self/status"), "VmRSS") << 10
    assert HostMeter().available_bytes() == pytest.approx(600_000 + own, abs=4 * MIB)
    limit.write_text("max\n")
    assert memory.host_bytes() > 2**30


def test_a_host_that_tells_nothing_has_its_physical_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_STATUS", "_MEMORY", "_CLEAR", "_CGROUP_LIMIT"):
        monkeypatch.setattr(memory, name, tmp_path / "nothing" / "here")
    meter = HostMeter()
    meter.begin()
    assert meter.peak_bytes() == 0
    assert meter.available_bytes() == memory.host_bytes() > 2**30
