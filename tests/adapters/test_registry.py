"""What stands between a framework and the plugin is little."""

from __future__ import annotations

from pathlib import Path

import gradckpt_dist

PACKAGE = Path(gradckpt_dist.__file__).parent
MOST_LINES = 119


def test_adapters_are_thin() -> None:
    launchers = [PACKAGE / "launcher" / f"{name}.py" for name in ("accelerate", "trainer", "trainer_events")]
    files = [*(PACKAGE / "adapters").glob("*.py"), *launchers, PACKAGE / "torchtitan.py"]
    assert len(files) >= 20
    assert [path.name for path in files if len(path.read_text().splitlines()) > MOST_LINES] == []
