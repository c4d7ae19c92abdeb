"""``gradckpt bench overhead``: the object that tools read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support import run_command


@pytest.mark.bench
def test_quick_run_prints_one_object(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "overhead.json"
    command = [sys.executable, "-m", "gradckpt_dist", "bench", "overhead", "--quick", "--json", "--output", str(output)]
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads(output.read_text())
    clocks = ("overhead", "cpu", "plugin", "probing")
    figures = {f"{prefix}{name}_fraction" for prefix in ("", "probe_") for name in clocks}
    assert {"name", "versions", "machine", "command", "rows", *figures} <= set(result)
    assert (result["name"], result["ranks"], result["interval"]) == ("overhead", 2, 8)
    assert [(row["pair"], row["replica"]) for row in result["rows"]] == [
        (pair, replica) for pair in ("norm", "probe") for replica in ("plugin", "pinned")
    ]
    assert min(result["plugin_fraction"], result["probe_plugin_fraction"]) > 0
    assert result["probing_fraction"] == 0 < result["probe_probing_fraction"]
