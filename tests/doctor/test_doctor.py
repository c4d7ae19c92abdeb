"""``gradckpt doctor``: what works here, and why not."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from support import run_command

from gradckpt_dist.adapters import versions
from gradckpt_dist.cli import main
from gradckpt_dist.doctor.compilers import compilers
from gradckpt_dist.doctor.diagnosis import WAYS_IN, diagnose
from gradckpt_dist.storage import STORAGES


def _finding(diagnosis: dict[str, Any], part: str) -> tuple[str, str]:
    (finding,) = [finding for finding in diagnosis["findings"] if part in finding["part"]]
    return finding["works"], finding["why"]


def test_everything_works_where_the_tests_run() -> None:
    diagnosis = diagnose()
    assert json.loads(json.dumps(diagnosis)) == diagnosis
    assert {finding["works"] for finding in diagnosis["findings"]} == {"yes"}
    assert {found["name"]: found["version"] for found in diagnosis["frameworks"]} == {
        name: support.tested for name, support in versions.FRAMEWORKS.items()
    }
    parts = " ".join(finding["part"] for finding in diagnosis["findings"]).split()
    assert set(STORAGES) <= set(parts)
    assert "gloo" in _finding(diagnosis, "several ranks")[1]


def test_missing_frameworks_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    compilers()  # imports
    monkeypatch.setattr("sys.path", [])
    diagnosis = diagnose()
    for framework, way in WAYS_IN.items():
        expected = f"{framework} is not installed; pip install 'gradckpt_dist[{framework}]'"
        assert _finding(diagnosis, way) == ("no", expected)


def test_configuration_that_cannot_be_used_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("gradckpt: {intervall: 3}")
    monkeypatch.setenv("GRADCKPT_CONFIG", str(tmp_path / "config.yaml"))
    works, why = _finding(diagnose(), "GRADCKPT_CONFIG")
    assert works == "no"
    assert "config.yaml: unknown key 'intervall'" in why


def test_without_a_compiler(tmp_path: Path) -> None:
    """On a PATH where inductor finds none."""
    command = [sys.executable, "-m", "gradckpt_dist", "doctor", "--json"]
    done = run_command(command, PATH=str(tmp_path), CXX="")
    assert done.returncode == 0, done.stderr
    diagnosis = json.loads(done.stdout)
    (compiler,) = diagnosis["compilers"]
    assert compiler["found"] is None
    assert _finding(diagnosis, "compress4")[0] == "slowly"
    assert _finding(diagnosis, "torch.compile") == ("no", compiler["advice"])
    assert _finding(diagnosis, "keep recompute")[0] == "yes"


def test_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "COLUMNS", "200")
    compilers()
    monkeypatch.setattr("sys.path", [])
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "pip install 'gradckpt_dist[torchtitan]'" in output
    assert "compiler for cpu: " in output
    assert "selective_half" in output
