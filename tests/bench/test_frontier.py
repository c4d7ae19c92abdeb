"""``gradckpt bench frontier``: the object that tools read, and what it does without the packages it would like."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support import run_command

KEYS = {
    "system", "model", "compiled", "budget", "tolerance", "peak_bytes", "held_bytes", "step_ratio", "relative_error",
    "minimum_seconds", "median_seconds", "median_ratio", "mask",
}  # fmt: skip
TORCHTITAN = ["torchtitan_selective", "torchtitan_budget"]


def _run(output: Path, **environment: str) -> tuple[dict, str]:
    command = [sys.executable, "-m", "gradckpt_dist", "bench", "frontier", "--quick", "--json", "--output", str(output)]
    done = run_command(command, 280.0, **environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads(output.read_text())
    return result, done.stderr


def _check_rows(result: dict) -> None:
    rows = {(row["model"], row["system"], row["budget"], row["tolerance"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"])
    keep, recompute = (rows["demo", system, None, 0.0] for system in ("keep", "recompute"))
    for row in result["rows"]:
        assert set(row) == KEYS
        assert 0 < row["held_bytes"] <= row["peak_bytes"]
        assert row["minimum_seconds"] <= row["median_seconds"]
        assert row["step_ratio"] > 0
        # Compiled blocks add up in another order.
        assert row["relative_error"] <= max(row["tolerance"], 1e-5 if row["compiled"] else 0)
    assert keep["median_ratio"] == 1
    assert keep["step_ratio"] == rows["uneven", "keep", None, 0.0]["step_ratio"] == 1
    for tolerance in (0.0, 0.05):
        least, most = (rows["demo", "gradckpt", budget, tolerance] for budget in (0.0, 1.0))
        # Two blocks hold about 4.5 MiB. The last one is kept where that takes no more at the peak.
        assert least["peak_bytes"] < recompute["peak_bytes"] + 2**20
        assert most["held_bytes"] < keep["held_bytes"] + 2**19
        assert [sum(int(part.split()[0]) for part in row["mask"].split(", ")) for row in (least, most)] == [2, 2]
    assert recompute["held_bytes"] < keep["held_bytes"] / 3
    assert rows["demo", "pytorch_sac", None, 0.0]["held_bytes"] < keep["held_bytes"]
    half, all_kept = (rows["uneven", *key] for key in (("gradckpt", 0.5, 0.0), ("keep", None, 0.0)))
    assert half["peak_bytes"] < 0.9 * all_kept["peak_bytes"]


def _rows_that_a_peer_fits(rows: list[dict]) -> int:
    """Of our exact rows on eager demo blocks. At budget 0 ours may take less memory than any peer, in some runs."""
    demo = [row for row in rows if row["model"] == "demo" and not row["compiled"]]
    least_bytes = min(row["peak_bytes"] for row in demo if row["system"] != "gradckpt")
    ours = [row for row in demo if row["system"] == "gradckpt" and row["tolerance"] == 0]
    return sum(least_bytes <= 1.02 * row["peak_bytes"] for row in ours)


@pytest.mark.bench
def test_quick_run_prints_one_object_and_draws_it(tmp_path: Path) -> None:
    pytest.importorskip("torchtitan")
    pytest.importorskip("matplotlib")
    result, progress = _run(tmp_path / "deep" / "frontier.json")
    assert {"name", "versions", "machine", "command", "comparisons"} <= set(result)
    assert (result["name"], result["rounds"], result["skipped"]) == ("frontier", 3, [])
    _check_rows(result)
    systems = {row["system"] for row in result["rows"] if row["model"] == "demo"}
    assert systems == {"keep", "recompute", "pytorch_sac", "gradckpt", *TORCHTITAN}
    kinds = [(one["model"], one["compiled"]) for one in result["comparisons"]]
    assert kinds == [("demo", False), ("demo", True), ("uneven", False)]
    eager = result["comparisons"][0]
    assert (eager["budgets"], eager["budgets_compared"]) == (2, _rows_that_a_peer_fits(result["rows"]))
    assert eager["budgets_compared"] >= 1
    against = [one["worst_against_best_peer"] for one in result["comparisons"] if one["budgets_compared"]]
    assert result["worst_against_best_peer"] == max(against)
    assert result["budgets_ahead"] in {0.0, 1.0}
    assert (tmp_path / "deep" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "deep" / "frontier.svg").read_text()
    assert "no figure" not in progress


@pytest.mark.bench
def test_missing_packages_are_reported_and_the_rest_is_measured(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("torchtitan", "matplotlib"):
        (hidden / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} here')")
    path = ":".join([str(hidden), str(Path(__file__).parents[2])])
    result, progress = _run(tmp_path / "frontier.json", PYTHONPATH=path)
    _check_rows(result)
    assert {row["system"] for row in result["rows"]} == {"keep", "recompute", "pytorch_sac", "gradckpt"}
    assert [row["system"] for row in result["skipped"]] == TORCHTITAN
    for row in result["skipped"]:
        assert row["reason"].startswith("ConfigError: torchtitan cannot be imported (no torchtitan here)")
        assert "gradckpt_dist[bench]" in row["reason"]
    assert "no figure: the figure needs matplotlib; install the extra `bench`" in progress
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["frontier.json"]
