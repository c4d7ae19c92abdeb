"""A step that runs out of memory is reported with the mask and the peaks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from support import run_command

from gradckpt_dist.out_of_memory import OutOfMemoryReport, is_out_of_memory

SCRIPT = """
import torch, gradckpt_dist
from models import Trainer, build

trainer = Trainer(build())
engine = gradckpt_dist.enable(trainer.model, {"interval": 4, "warmup_steps": 0, "log_dir": LOG})
trainer.train(8)

def too_much(gradient):
    return torch.empty(1 << 50, dtype=torch.uint8)

for parameter in trainer.model.parameters():
    parameter.register_hook(too_much)
trainer.train(1)
"""


def test_an_allocation_that_fails_in_backward_is_reported_before_its_traceback(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("LOG", repr(str(tmp_path))))
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = run_command([sys.executable, str(script)], PYTHONPATH=os.pathsep.join(paths))
    assert done.returncode == 1
    report, traceback = done.stderr.index("rank 0 is out of memory in step 8"), done.stderr.index("Traceback")
    assert report < traceback
    assert "lower memory_budget (now auto)" in done.stderr
    events = [json.loads(line) for line in (tmp_path / "gradckpt.jsonl").read_text().splitlines()]
    last = events[-1]
    assert (last["event"], last["step"]) == ("out_of_memory", 8)
    assert f"under mask {','.join(last['mask'])}; predicted peak" in done.stderr
    assert last["process_peak_bytes"] > last["held_bytes"] > 0


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("not enough memory"))


class _Owner:
    def __init__(self) -> None:
        self.reports = 0

    def report(self) -> None:
        self.reports += 1


def test_it_reports_once_and_leaves_the_hook_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    owner, before = _Owner(), sys.excepthook
    hook = OutOfMemoryReport(owner.report)
    assert sys.excepthook is hook
    sys.excepthook(RuntimeError, RuntimeError("other"), None)
    assert owner.reports == 0
    for _ in range(2):
        sys.excepthook(MemoryError, MemoryError(), None)
    assert owner.reports == 1
    assert "RuntimeError: other" in capsys.readouterr().err
    hook.remove()
    assert sys.excepthook is before


def test_it_stays_below_a_hook_that_came_later_and_does_nothing() -> None:
    owner, before = _Owner(), sys.excepthook
    hook = OutOfMemoryReport(owner.report)
    seen = []
    sys.excepthook = lambda kind, error, traceback: seen.append(hook(kind, error, traceback))
    try:
        hook.remove()
        sys.excepthook(MemoryError, MemoryError(), None)
    finally:
        sys.excepthook = before
    assert seen == [None]
    assert owner.reports == 0
