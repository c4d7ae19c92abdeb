"""torchrun starts the ranks anew after one was killed, and they go on from the last checkpoint."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from support import free_port, run_command

STEPS = 26
HERE = Path(__file__).parent
TESTS = HERE.parent


def _trained(folder: Path, deaths: list[str]) -> list[dict[int, list[tuple[int, float, str, int]]]]:
    """By rank and step, what each life of it recorded: its number, loss, digest and epoch."""
    folder.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--max-restarts={len(deaths)}"]
    launch += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--monitor-interval=0.1"]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), str(TESTS.parent / "launch"), str(HERE)])
    done = run_command(
        [*launch, str(HERE / "elastic_script.py"), str(folder), str(STEPS), *deaths],
        timeout_seconds=280,
        OMP_NUM_THREADS="1",
        PYTHONPATH=paths,
        # Ranks of a second life find the addresses of the first in torchrun's own store, and gloo connects to these
        # (torch 2.13, whatever the script); with this, rank 0 hosts a new store in each life.
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )
    assert done.returncode == 0, done.stderr
    records = []
    for rank in range(2):
        steps: dict[int, list[tuple[int, float, str, int]]] = {}
        for line in (folder / f"rank{rank}.jsonl").read_text().splitlines():
            life, step, *found = json.loads(line)
            steps.setdefault(step, []).append((life, *found))
        records.append(steps)
    return records


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_kills_leave_losses_and_masks_as_they_were(tmp_path: Path) -> None:
    unbroken = _trained(tmp_path / "unbroken", [])
    broken = _trained(tmp_path / "broken", ["1:8", "0:13", "1:22"])
    for ours, theirs in zip(broken, unbroken, strict=True):
        assert sorted(ours) == sorted(theirs) == list(range(1, STEPS + 1))
        for step, lives in ours.items():
            _, *expected = theirs[step][0]
            assert all(found == expected for _, *found in lives), step
        assert {life for lives in ours.values() for life, *_ in lives} == {0, 1, 2, 3}
        assert len({lives[0][2] for lives in ours.values()}) >= 2
