"""The real worker process: what it answers, refuses and fails at."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gradckpt_dist.bench.frontier import memory
from gradckpt_dist.bench.frontier.processes import Processes
from gradckpt_dist.bench.frontier.setting import Setting, Size
from gradckpt_dist.errors import GradckptError

SIZE = Size(width=128, context=64, batch=4, layers=3, head_width=32)
INPUT_BYTES = 4 * 64 * 128 * 4


def _build(setting: Setting) -> dict[str, Any]:
    return {"setting": setting.to_dict(), "size": asdict(SIZE), "reference": True}


def test_a_peer_is_built_timed_and_measured(tmp_path: Path) -> None:
    pytest.importorskip("torchtitan")
    with Processes(tmp_path) as processes:
        worker = processes.start("peer", **memory.HANDS_BACK)
        built = worker.ask(_build(Setting(system="torchtitan_full", model="demo")))
        assert set(built) == {"saved"}
        assert worker.ask({"do": "timed_step"})["seconds"] > 0
        assert len(os.sched_getaffinity(worker.number)) == 1
        found = worker.ask({"do": "measure", "storages": []})
        assert found["relative_error"] == 0
        # Three inputs, logits of 96 characters and the head's input; keeping all would hold over ten times as much.
        assert 3 * INPUT_BYTES < found["held_bytes"] < 10 * INPUT_BYTES < found["peak_bytes"]
        with pytest.raises(GradckptError, match="TypeError: only ours has a mask"):
            worker.ask({"do": "settle", "budget": 0.5})
        with pytest.raises(GradckptError, match="AttributeError"):
            worker.ask({"do": "dance"})
        assert worker.ask({"do": "timed_step"})["seconds"] > 0


def test_ours_settles_and_is_pinned(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        worker = processes.start("ours", **memory.HANDS_BACK)
        worker.ask(_build(Setting(system="gradckpt", model="demo")))
        masks = [worker.ask({"do": "settle", "budget": budget})["storages"] for budget in (0.0, 0.5, 1.0)]
        # The last block is the first in backward, where keeping it takes no more than redoing it.
        assert masks[0][:2] == ["recompute"] * 2
        assert masks[2] == ["keep"] * 3
        assert set(masks[1]) - {"keep"}
        least, half, most = (worker.ask({"do": "measure", "storages": mask}) for mask in masks)
        assert max(least["held_bytes"], half["held_bytes"]) < most["held_bytes"]
        assert [found["relative_error"] for found in (least, half, most)] == [0, 0, 0]


def test_an_unknown_system_is_a_failure_and_a_missing_mask_a_refusal(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        worker = processes.start("nobody")
        with pytest.raises(GradckptError, match=r"^nobody: KeyError: 'magic'"):
            worker.ask(_build(Setting(system="magic", model="demo")))
        refused = Setting(system="gradckpt", model="demo", storages=("keep",))
        with pytest.raises(GradckptError, match=r"^MaskError: "):
            worker.ask(_build(refused))
