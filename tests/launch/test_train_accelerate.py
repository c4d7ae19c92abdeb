"""The Accelerate script and the configuration files for it, run as they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import run_command

from gradckpt_dist.config import SECTION, section_owners

REPOSITORY = Path(__file__).parents[2]
SCRIPT = str(REPOSITORY / "launch" / "train_accelerate.py")
SIZES = {"steps": 60, "batch": 2, "context": 16, "width": 16, "layers": 3, "heads": 2}
TINY = [f"--{name}={size}" for name, size in SIZES.items()]
OURS = ["-m", "gradckpt_dist", "accelerate", "launch"]
THEIRS = ["-m", "accelerate.commands.launch"]


def _config(name: str) -> Path:
    return REPOSITORY / "configs" / f"accelerate_{name}.yaml"


def _without_section(name: str, folder: Path) -> str:
    document = yaml.safe_load(_config(name).read_text())
    (owner,) = section_owners(document)
    del owner[SECTION]
    path = folder / "plain.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


def _losses(folder: Path, *command: str, cpu: bool = True) -> list[str]:
    environment = {"OMP_NUM_THREADS": "1", **({"ACCELERATE_USE_CPU": "true"} if cpu else {})}
    shell = ["/bin/sh", "-c", 'cd "$0" && exec "$@"', str(folder), sys.executable]
    done = run_command([*shell, *command, *TINY], **environment)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(lines) >= SIZES["steps"]
    return lines


def _decisions(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "runs" / "gradckpt" / "gradckpt.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert events[0]["event"] == "start"
    assert events[0]["blocks"] == ["blocks.0", "blocks.1", "blocks.2"]
    return [event for event in events if event["event"] == "decision"]


def _check(folder: Path) -> None:
    decisions = _decisions(folder)
    assert decisions
    assert decisions[-1]["ranks"] == 2
    assert "keep" in decisions[-1]["mask"]  # it began with full recompute, and all of it fits


def test_ddp(tmp_path: Path) -> None:
    plain = _losses(tmp_path, *THEIRS, "--config_file", _without_section("ddp", tmp_path), SCRIPT)
    assert _losses(tmp_path, *OURS, "--config_file", str(_config("ddp")), SCRIPT) == plain
    _check(tmp_path)


@pytest.mark.slow
def test_fsdp2_which_is_ddp_on_a_cpu(tmp_path: Path) -> None:
    """With Accelerate's own launcher too: it accepts the section where it is."""
    config = str(_config("fsdp2"))
    plain = _losses(tmp_path, *THEIRS, "--config_file", _without_section("fsdp2", tmp_path), SCRIPT)
    assert _losses(tmp_path, *OURS, "--config_file", config, SCRIPT) == plain
    _check(tmp_path)
    inner = ["-m", "gradckpt_dist", "run", "--config", config, SCRIPT]
    assert _losses(tmp_path, *THEIRS, "--config_file", config, *inner) == plain
    _check(tmp_path)


@pytest.mark.slow
def test_deepspeed(tmp_path: Path) -> None:
    plain = _losses(tmp_path, *THEIRS, "--config_file", _without_section("deepspeed", tmp_path), SCRIPT, cpu=False)
    assert _losses(tmp_path, *OURS, "--config_file", str(_config("deepspeed")), SCRIPT, cpu=False) == plain
    _check(tmp_path)
