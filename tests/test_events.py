"""The event log, and what it does when it cannot be written."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from gradckpt_dist.events import EventLog


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_json_object_a_line_appended(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    for step in range(2):
        log = EventLog(str(folder), 0, all_ranks=False)
        log.write("decision", step=step, mask=["keep"], theta=None, note="a\nb …")
    assert _lines(folder / "gradckpt.jsonl") == [
        {"event": "decision", "step": step, "mask": ["keep"], "theta": None, "note": "a\nb …"} for step in range(2)
    ]


def test_other_ranks_have_files_of_their_own_or_none(tmp_path: Path) -> None:
    EventLog(str(tmp_path / "quiet"), 1, all_ranks=False).write("start")
    assert not (tmp_path / "quiet").exists()
    EventLog(str(tmp_path), 1, all_ranks=True).write("start")
    assert _lines(tmp_path / "gradckpt.rank1.jsonl") == [{"event": "start"}]
    assert [path.name for path in tmp_path.iterdir()] == ["gradckpt.rank1.jsonl"]


def test_no_folder_no_log() -> None:
    EventLog(None, 0, all_ranks=True).write("start", value=float("nan"))


def _folder_under_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "log"


def _full_disk(tmp_path: Path) -> Path:
    (tmp_path / "gradckpt.jsonl").symlink_to("/dev/full")
    return tmp_path


@pytest.mark.parametrize("fault", [_folder_under_a_file, _full_disk])
def test_warns_once_and_stops(fault: object, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = fault(tmp_path)  # type: ignore[operator]
    log = EventLog(str(folder), 0, all_ranks=False)
    with caplog.at_level(logging.WARNING, logger="gradckpt_dist"):
        for step in range(3):
            log.write("decision", step=step)
    (record,) = caplog.records
    assert str(folder / "gradckpt.jsonl") in record.getMessage()
    assert "it stops here" in record.getMessage()
