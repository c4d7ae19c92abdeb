"""The command line: bad input gets one clear line and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support import run_command

BAD_CONFIGS = {
    "unknown key": ("gradckpt: {intervall: 3}", "unknown key 'intervall'; did you mean 'interval'?"),
    "unknown key in a section": ("gradckpt: {threshold: {valeu: 3}}", "did you mean 'value'?"),
    "wrong type": (
        "gradckpt: {interval: often}",
        "interval: 'often' is not allowed; give a whole number of at least 2",
    ),
    "out of range": ("gradckpt: {memory_budget: 1.5}", "a fraction from 0 (full recompute) to 1 (keep all)"),
    "unknown unit": ("gradckpt: {memory_budget: 40Gib}", "units KiB, MiB, GiB, TiB, such as '40GiB'"),
    "does not parse": ("gradckpt: {interval: [", "not valid YAML"),
    "no section": ("fsdp: {}", "no top-level section 'gradckpt'"),
    "not a section": ("gradckpt: [1]", "give a section with keys and values"),
    "empty": ("", "no top-level section 'gradckpt'"),
}


def _refused(*args: str, **environment: str) -> str:
    done = run_command([sys.executable, "-m", "gradckpt_dist", *args], **environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return str(done.stderr)


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_bad_configuration_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    text, expected = BAD_CONFIGS[what]
    (tmp_path / "train.py").write_text("print('ran')")
    (tmp_path / "config.yaml").write_text(text)
    line = _refused("run", "--config", str(tmp_path / "config.yaml"), str(tmp_path / "train.py"))
    assert line.startswith("gradckpt: ConfigError: ")
    assert str(tmp_path / "config.yaml") in line
    assert expected in line


def test_missing_files_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('ran')")
    script = str(tmp_path / "train.py")
    assert "there is no such file" in _refused("run", "--config", str(tmp_path / "no.yaml"), script)
    assert "there is no such file" in _refused("run", script, GRADCKPT_CONFIG=str(tmp_path / "no.json"))
    assert "there is no such script" in _refused("run", str(tmp_path / "no.py"))
    assert "there is no such module" in _refused("run", "-m", "no.such.module")


def test_help_lists_the_commands() -> None:
    done = run_command([sys.executable, "-m", "gradckpt_dist", "--help"])
    assert done.returncode == 0
    assert "run a training script" in done.stdout
    assert "bench" in done.stdout
