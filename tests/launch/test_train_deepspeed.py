"""The ready DeepSpeed configurations and their script, under both launchers."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support import free_port, run_command

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

REPOSITORY = Path(__file__).parents[2]
SCRIPT = str(REPOSITORY / "launch/train_deepspeed.py")
SIZES = ["--context=16", "--width=32", "--layers=6", "--heads=2", "--steps=16"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
DEEPSPEED = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus=2"]
RUN = ["gradckpt_dist", "run"]


def _config(folder: Path, name: str, **changes: Any) -> Path:
    """A copy of the ready file, whose ``gradckpt`` section logs to the folder on all ranks."""
    document = json.loads((REPOSITORY / "configs" / name).read_text())
    document["gradckpt"] |= {"log_dir": str(folder / "log"), "log_level": "debug", **changes}
    path = folder / name
    path.write_text(json.dumps(document))
    return path


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return run_command(list(command), 250, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", DS_IGNORE_CUDA_DETECTION="1")


def _torchrun(config: Path, *start: str) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, f"--master-port={free_port()}", *start, SCRIPT, *SIZES]
    return _run(*command, "--deepspeed_config", str(config))


def _losses(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("step ")]


def _decisions(folder: Path) -> list[list[dict[str, Any]]]:
    """By rank."""
    logs = [(folder / "log" / name).read_text() for name in ("gradckpt.jsonl", "gradckpt.rank1.jsonl")]
    events = [[json.loads(line) for line in log.splitlines()] for log in logs]
    assert [event["event"] for log in events for event in log].count("start") == 2
    return [[event for event in log if event["event"] == "decision"] for log in events]


def _check_decisions(folder: Path) -> None:
    first, second = _decisions(folder)
    assert first
    assert [(d["step"], d["epoch"], d["digest"]) for d in first] == [
        (d["step"], d["epoch"], d["digest"]) for d in second
    ]


def test_section_of_the_file_is_enough_under_torchrun(tmp_path: Path) -> None:
    config = _config(tmp_path, "deepspeed_zero2.json", policy="threshold", memory_budget=0.5, interval=4)
    plain = _losses(_torchrun(config))
    ours = _torchrun(config, "-m", *RUN)
    assert _losses(ours) == plain
    assert len(plain) == 16
    _check_decisions(tmp_path)
    masks = {tuple(decision["mask"]) for decision in _decisions(tmp_path)[0]}
    assert {"keep", "recompute"} <= set(masks.pop())


@pytest.mark.slow
def test_wrong_key_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    config = _config(tmp_path, "deepspeed_zero2.json", memory_bugdet="1GiB")
    done = _torchrun(config, "-m", *RUN)
    assert done.returncode
    said = f"gradckpt: ConfigError: {config}: unknown key 'memory_bugdet'; did you mean 'memory_budget'?"
    assert said in done.stderr, done.stderr
    assert SCRIPT not in done.stderr  # no traceback but torchrun's own


@pytest.mark.slow
def test_ready_files_under_deepspeeds_launcher(tmp_path: Path) -> None:
    for name in ("deepspeed_zero3.json", "deepspeed_zero2.json"):
        folder = tmp_path / name.removesuffix(".json")
        folder.mkdir()
        config = _config(folder, name)
        launch = [*DEEPSPEED, f"--master_port={free_port()}"]
        command = ["--module", *RUN, SCRIPT, *SIZES, "--deepspeed_config", str(config)]
        ours = _run(*launch, *command)
        losses = _losses(ours)
        plain = _run(*launch, SCRIPT, *SIZES, "--deepspeed_config", str(config))
        assert losses == _losses(plain)
        _check_decisions(folder)
        start = json.loads((folder / "log" / "gradckpt.jsonl").read_text().splitlines()[0])
        expected = (200, 0.1) if name == "deepspeed_zero3.json" else (50, 0.05)
        assert (start["config"]["interval"], start["config"]["hysteresis"]) == expected
