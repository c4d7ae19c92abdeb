from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from demo_summary import (
    TooShortError,
    last_step,
    masks_identical,
    most_held_bytes,
    read_lines,
    recomputed_blocks,
    stays,
    step_ratio,
    turn_medians,
)

ALL, HALF, OTHER = ["recompute"] * 2, ["recompute", "keep"], ["keep", "recompute"]


def step(started: float, ended: float) -> dict[str, Any]:
    return {"event": "step", "seconds": ended - started, "started": started, "ended": ended}


def decision(step: int, mask: list[str], theta: float | None = None, held: int | None = None) -> dict[str, Any]:
    digest = "".join(mask)
    return {
        "event": "decision",
        "step": step,
        "epoch": step,
        "digest": digest,
        "mask": mask,
        "theta": theta,
        "held_bytes": held,
    }


LOG = [
    {"event": "start", "mask": ALL},
    decision(10, HALF, 0.5, held=100),
    decision(20, HALF, 0.75, held=300),
    decision(30, OTHER, 0.25, held=250),
    decision(40, HALF, 1.0),
]


def test_steps_that_a_pause_touched_are_left_out() -> None:
    metrics = [step(0, 1), step(1, 4), step(4, 103), step(103, 105), step(105, 204), {"event": "validation"}]
    assert turn_medians(metrics, pauses=[(4.5, 102.5), (150, 160)]) == {0: 2, 1: 2}
    assert turn_medians(metrics[:2], pauses=[]) == {0: 2}


def test_a_pause_between_two_steps_touches_neither() -> None:
    assert turn_medians([step(0, 1), step(5, 8)], pauses=[(1, 5)]) == {0: 1, 1: 3}


def test_ratio_compares_turns_next_to_each_other() -> None:
    plain = {1: 1.0, 2: 4.0, 3: 1.0}  # the machine was busy in turn 2
    assert step_ratio({1: 1.5, 2: 6.0, 3: 1.5, 4: 99.0}, plain) == 1.5


def test_ratio_of_runs_without_a_common_turn_compares_them_whole() -> None:
    assert step_ratio({1: 3.0}, {0: 2.0}) == 1.5


def test_no_undisturbed_step_is_an_error() -> None:
    with pytest.raises(TooShortError, match="no step ran without a pause"):
        step_ratio(turn_medians([step(0, 10)], pauses=[(4, 5)]), {0: 1.0})


def test_stays_tell_each_distinct_mask_once() -> None:
    told = [(stay.letters, stay.steps, stay.thetas, stay.decided) for stay in stays(LOG, last_step=50)]
    assert told == [
        ("RR", ((1, 9),), None, False),
        ("RK", ((10, 29), (40, 50)), (0.5, 1.0), True),
        ("KR", ((30, 39),), (0.25, 0.25), True),
    ]


def test_stays_in_words() -> None:
    told = [stay.describe() for stay in stays(LOG, last_step=50)]
    assert told == ["steps 1-9", "steps 10-29, 40-50, theta 0.5 to 1", "steps 30-39, theta 0.25"]


def test_held_bytes_are_the_most_that_was_measured() -> None:
    assert most_held_bytes(LOG) == 300
    assert most_held_bytes(LOG[:1]) is None


def test_recomputed_blocks_are_those_of_the_last_mask() -> None:
    assert recomputed_blocks(LOG) == 1
    assert recomputed_blocks(LOG[:1]) == 2


def test_masks_are_identical_only_if_all_ranks_logged_the_same_decisions() -> None:
    assert masks_identical([LOG, LOG[1:]])
    assert not masks_identical([LOG, LOG[:-1]])
    assert not masks_identical([LOG, [*LOG[:-1], decision(40, OTHER)]])
    assert not masks_identical([LOG, []])
    assert not masks_identical([[], []])


def test_an_unfinished_last_line_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    assert last_step(path) == 0
    lines = [{"event": "start"}, *({"event": "step", "step": number} for number in range(1, 500))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "st', encoding="utf-8")
    assert read_lines(path) == lines
    assert last_step(path) == 499
