"""The ready files of configs/."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradckpt_dist import Config

FILES = sorted((Path(__file__).parents[1] / "configs").iterdir())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_file_is_a_valid_configuration(path: Path) -> None:
    assert Config.from_file(path).enabled
