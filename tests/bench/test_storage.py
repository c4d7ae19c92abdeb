"""``gradckpt bench storage``: the object that tools read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support import run_command

from gradckpt_dist.storage import STORAGES

KEYS = {
    "storage", "d", "dtype", "compiled", "held_fraction", "peak_fraction", "forward_ratio", "backward_ratio",
    "step_ratio", "relative_error", "exact", "held_bytes", "peak_bytes", "minimum_seconds", "median_seconds",
}  # fmt: skip


@pytest.mark.bench
def test_quick_run_prints_one_object(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "storage.json"
    command = [sys.executable, "-m", "gradckpt_dist", "bench", "storage", "--quick", "--json", "--output", str(output)]
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads(output.read_text())
    assert {"name", "versions", "machine", "command", "rows", "refused", "quantiser"} <= set(result)
    assert (result["name"], result["tokens"], result["blocks"], result["refused"]) == ("storage", 1024, 4, [])
    rows = {row["storage"]: row for row in result["rows"]}
    assert list(rows) == list(STORAGES)
    for name, row in rows.items():
        assert set(row) == KEYS
        assert (row["d"], row["dtype"], row["compiled"]) == (256, "fp32", False)
        assert row["exact"] is STORAGES[name].exact
        assert row["held_bytes"] <= row["peak_bytes"]
        assert (row["relative_error"] == 0) == row["exact"]
    ratios = ("held_fraction", "peak_fraction", "forward_ratio", "backward_ratio", "step_ratio")
    assert [rows["keep"][ratio] for ratio in ratios] == [1.0] * 5
    # The blocks' inputs of 1 MiB each, besides which the generator's state is held for dropout.
    assert rows["recompute"]["held_bytes"] < 4 * 2**20 + 64 * 2**10
    assert rows["recompute"]["peak_fraction"] < 0.5
    assert rows["offload"]["held_fraction"] < 0.01
    assert rows["offload"]["peak_fraction"] < 0.55  # two blocks of four
    assert rows["compress8"]["held_fraction"] <= 0.28
    assert rows["compress4"]["held_fraction"] <= 0.16
    assert {(row["dtype"], row["bits"], row["direction"]) for row in result["quantiser"]} == {
        (dtype, bits, direction)
        for dtype in ("fp32", "bf16", "fp16")
        for bits in (8, 6, 4)
        for direction in ("quantise", "dequantise")
    }
    for row in result["quantiser"]:
        assert 0 < row["minimum_seconds"] <= row["median_seconds"]
        assert row["fraction_of_memory_copy"] > 0
