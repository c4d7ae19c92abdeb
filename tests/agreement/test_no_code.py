"""Nothing that another rank sends is unpickled or evaluated: what could do so is not even named."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import gradckpt_dist

PACKAGE = Path(gradckpt_dist.__file__).parent
RECEIVERS = sorted([*(PACKAGE / "agreement").glob("*.py"), PACKAGE / "saved_state.py", PACKAGE / "knowledge.py"])
FORBIDDEN = {
    "pickle",
    "marshal",
    "dill",
    "cloudpickle",
    "eval",
    "exec",
    "compile",
    "import_module",
    "__import__",
    "load",
}


@pytest.mark.parametrize("path", RECEIVERS, ids=lambda path: path.name)
def test_what_reads_messages_cannot_run_them(path: Path) -> None:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.name.split(".")[0] for alias in node.names}
            names.add((getattr(node, "module", None) or "").split(".")[0])
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Name):
            names.add(node.id)
    assert not names & FORBIDDEN
    assert not {name for name in names if name.endswith(("_object", "_object_list"))}


def test_there_are_messages_to_read() -> None:
    assert {"wire.py", "roll_call.py", "collectives.py", "rows.py"} <= {path.name for path in RECEIVERS}
