"""Taking turns, on scripted processes: what is timed once, what is compared with what, and what is left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gradckpt_dist.bench.frontier.crew import Crew
from gradckpt_dist.bench.frontier.phases import Timer, budget_of_full_recompute, first_with_mask, measure_bytes, settle
from gradckpt_dist.bench.frontier.plan import QUICK
from gradckpt_dist.bench.frontier.processes import Processes
from gradckpt_dist.bench.frontier.setting import Setting

# Steps of keep take 2, 3, 4 … seconds, of all others 3 times as many; saved tensors change at budget 0.5.
SCRIPT = """
import json, os, sys


def main():
    setting, taken = None, 1
    for line in sys.stdin:
        request = json.loads(line)
        if setting is None:
            setting = request["setting"]
            answer = {"saved": "much" if (setting["budget"] or 1) >= 0.5 else "little"}
            if setting["system"] == "pytorch_sac":
                answer = {"refused": "not here"}
        elif request["do"] == "timed_step":
            taken += 1 if "hugetlb" in os.environ["GLIBC_TUNABLES"] else 1000
            answer = {"seconds": taken * (1 if setting["system"] == "keep" and not setting["compiled"] else 3)}
        elif request["do"] == "settle":
            answer = {"storages": ["keep" if request["budget"] > 0.5 else "recompute"]}
        else:
            held = len(request["storages"]) + int("MALLOC_MMAP_THRESHOLD_" in os.environ) + 10 * setting["tolerance"]
            peaks = {"recompute": 56, "keep": 250, "gradckpt": 50}
            peak = peaks[setting["system"]] if setting["compiled"] else os.getpid()
            answer = {"held_bytes": held, "peak_bytes": peak, "relative_error": 0}
        print(json.dumps(answer), flush=True)
"""
KEEP = Setting(system="keep", model="demo")
OURS = Setting(system="gradckpt", model="demo", storages=("keep", "keep"), budget=1.0)


def _crew(processes: Processes) -> Crew:
    return Crew(processes, QUICK.size)


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "scripted.py").write_text(SCRIPT)
    with Processes(tmp_path, module="scripted") as processes:
        yield processes


def test_equal_masks_are_one() -> None:
    lossy, compiled = replace(OURS, budget=0.9, tolerance=0.05), replace(OURS, compiled=True)
    other = replace(OURS, storages=("keep", "recompute"))
    peers = [replace(KEEP, system="every_2"), replace(KEEP, system="every_3")]
    same = first_with_mask([*peers, OURS, lossy, compiled, other])
    assert same == {peers[0]: peers[0], peers[1]: peers[1], OURS: OURS, lossy: OURS, compiled: compiled, other: other}


@pytest.mark.parametrize("group", [2, 12])
def test_steps_are_compared_with_keep_in_the_same_rounds(processes: Processes, group: int) -> None:
    compiled = [replace(KEEP, system="compile_budget", compiled=True, budget=budget) for budget in (0.1, 0.2, 0.5, 1.0)]
    refused = replace(KEEP, system="pytorch_sac")
    kept = replace(KEEP, compiled=True)
    crew = _crew(processes)
    timer = Timer(crew, replace(QUICK, rounds=3, group=group), KEEP)
    timer.run([kept, refused, *compiled, OURS])
    assert set(timer.timings) == {KEEP, kept, compiled[0], OURS}
    assert timer.same == {compiled[1]: compiled[0], compiled[2]: kept, compiled[3]: kept}
    assert [(row["system"], row["reason"]) for row in crew.skipped] == [("pytorch_sac", "not here")]
    assert timer.timings[KEEP].step_ratio == 1
    assert (timer.timings[KEEP].minimum_seconds, timer.timings[KEEP].median_seconds) == (2, 3)
    assert timer.timings[kept].step_ratio == timer.timings[kept].median_ratio == 3
    # In a later group keep's own seconds have gone up: 3 rounds a group.
    assert timer.timings[OURS].step_ratio == pytest.approx(6 / (2 + 3 * (6 // group)))
    assert timer.timings[OURS].median_ratio == pytest.approx(9 / (3 + 3 * (6 // group)))


def test_masks_are_settled_for_every_budget(processes: Processes) -> None:
    settled = settle(_crew(processes), QUICK, QUICK.models[0])
    assert [(setting.tolerance, setting.budget, setting.storages) for setting in settled] == [
        (tolerance, budget, (storage,))
        for tolerance in (0.0, 0.05)
        for budget, storage in ((0, "recompute"), (1, "keep"))
    ]


def test_compiled_blocks_are_settled_at_full_recomputes_peak_too(processes: Processes) -> None:
    model = replace(QUICK.models[0], compiled_peers=("keep", "recompute"), compiled_tolerances=(0.05,))
    settled = settle(_crew(processes), QUICK, model)
    assert [setting.budget for setting in settled if setting.compiled] == [0.0, 1.0, 0.03]
    assert {setting.budget for setting in settled if not setting.compiled} == {0.0, 1.0}
    assert budget_of_full_recompute(_crew(processes), QUICK, replace(model, compiled_peers=("keep",))) is None


def test_bytes_are_measured_with_malloc_set_up_and_ours_in_one_process(processes: Processes) -> None:
    lossy, other = replace(OURS, tolerance=0.1), replace(OURS, storages=("keep",))
    settings = [KEEP, replace(KEEP, system="pytorch_sac"), OURS, other, lossy]
    found = measure_bytes(_crew(processes), settings)
    assert {setting: bytes_.held_bytes for setting, bytes_ in found.items()} == {KEEP: 1, OURS: 3, other: 2, lossy: 4}
    assert found[OURS].peak_bytes == found[other].peak_bytes != found[lossy].peak_bytes
