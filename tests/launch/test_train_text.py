from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from text_model import read_text
from train_text import parse_arguments

REPOSITORY = Path(__file__).parents[2]
SIZES = {"batch": 2, "context": 16, "width": 16, "layers": 2, "heads": 2, "validation-tokens": 600}
TINY = [f"--{name}={size}" for name, size in SIZES.items()]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def train(metrics: Path, *arguments: str, ranks: int = 2) -> list[dict[str, Any]]:
    """Run the script; what it wrote to its metrics."""
    launcher = TORCHRUN if ranks > 1 else []
    script = ["launch/train_text.py", *TINY, "--device", "cpu", "--metrics", str(metrics), *arguments]
    done = subprocess.run(
        [sys.executable, *launcher, *script],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def losses(lines: list[dict[str, Any]]) -> list[tuple[str, int, float]]:
    return [(line["event"], line["step"], line["loss"]) for line in lines if "loss" in line]


def test_one_process_writes_start_steps_and_validation(tmp_path: Path) -> None:
    lines = train(tmp_path / "m.jsonl", "--steps", "3", "--validate-every", "2", "--autocast", "bf16", ranks=1)
    assert [line["event"] for line in lines] == ["start", "step", "step", "validation", "step", "validation"]
    assert lines[0]["sha256"] == read_text(None).sha256
    assert lines[-1]["tokens"] == 608
    assert all(line["seconds"] == line["ended"] - line["started"] for line in lines if line["event"] == "step")


@pytest.mark.parametrize(
    "parallel", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "fsdp1")), "fsdp2"]
)
def test_resumed_run_equals_an_unbroken_one_bitwise(tmp_path: Path, parallel: str) -> None:
    common = ["--parallel", parallel, "--accumulate", "2", "--dropout", "0.2"]
    unbroken = train(tmp_path / "unbroken.jsonl", *common, "--steps", "4", "--validate-every", "2")
    checkpoint = ["--checkpoint", str(tmp_path / "text.pt")]
    train(tmp_path / "broken.jsonl", *common, *checkpoint, "--steps", "2")
    resumed = train(tmp_path / "broken.jsonl", *common, *checkpoint, "--steps", "4", "--resume")
    assert losses(resumed) == losses(unbroken)
    assert len(losses(unbroken)) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--parallel ddp", "needs torchrun"),
        ("--width 10 --heads 4", "--width 10 is no multiple of --heads 4"),
        ("--steps 0", "0 is too small; give at least 1"),
        ("--steps many", "invalid whole_number value: 'many'"),
        ("--dropout 1", "--dropout 1.0 is out of range"),
        ("--resume", "give --checkpoint FILE"),
        ("--resume --checkpoint nowhere.pt", "no checkpoint at nowhere.pt"),
        ("--text nowhere.txt", "nowhere.txt"),
        ("--validation-tokens 1000000", "do not fit into the"),
    ],
)
def test_wrong_arguments_are_one_clear_line(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_text.py", *arguments.split()])
    with pytest.raises(SystemExit) as exit_info:
        parse_arguments()
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_one_process_is_refused_on_two_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["train_text.py", "--parallel", "none"])
    with pytest.raises(SystemExit):
        parse_arguments()
    assert "give ddp, fsdp1 or fsdp2 under torchrun" in capsys.readouterr().err
