"""The figure has a panel for each kind, a line for each system, and units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gradckpt_dist.bench.frontier.figure import draw_frontier


def _row(system: str, model: str, compiled: bool, tolerance: float, peak_bytes: int) -> dict[str, Any]:
    return {
        "system": system,
        "model": model,
        "compiled": compiled,
        "tolerance": tolerance,
        "peak_bytes": peak_bytes,
        "step_ratio": 1 + 1e6 / peak_bytes,
    }


def test_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [_row("gradckpt", "demo", False, tolerance, size) for tolerance in (0.0, 0.05) for size in (10**6, 10**7)]
    rows += [_row(system, "demo", False, 0.0, 10**7) for system in ("keep", "recompute", "every_2")]
    rows += [_row("compile_budget", "uneven", True, 0.0, 10**7)]
    written = draw_frontier({"rows": rows}, tmp_path / "deep" / "frontier.json")
    assert written == [tmp_path / "deep" / "frontier.png", tmp_path / "deep" / "frontier.svg"]
    assert written[0].read_bytes().startswith(b"\x89PNG")
    axes = ("peak of a step above parameters and gradients (MiB)", "step time / eager keep")
    drawn = written[1].read_text()
    for text in ("demo model, eager blocks", "uneven model, compiled blocks", *axes):
        assert f"<!-- {text} -->" in drawn
    labels = ("gradckpt, exact", "gradckpt, tolerance 0.05", "torch.compile, memory budget", "keep all")
    for label in (*labels, "recompute every n-th block (n = 1 to 4)"):
        assert drawn.count(f"<!-- {label} -->") == 1
    assert "gradckpt, tolerance 0.01" not in drawn
