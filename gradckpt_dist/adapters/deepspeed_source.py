"""Which file a DeepSpeed configuration came from: DeepSpeed keeps what it read, and not where."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradckpt_dist.config import SECTION
from gradckpt_dist.live_objects import live_objects

_MOST_BYTES = 1 << 20


def where_found(section: Any) -> str:
    """The file among those at hand that has the very same ``gradckpt`` section; else words for it."""
    path = next((path for path in _candidates() if _section_of(path) == (section,)), None)
    return f"section {SECTION!r} of the DeepSpeed configuration" if path is None else str(path)


def _candidates() -> Iterator[Path]:
    """What the script was given, and JSON files beside the script or in the working folder."""
    given = [argument.rpartition("=")[2] for argument in sys.argv[1:]]
    variable = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    yield from map(Path, (*given, variable, *_given_to_transformers()))
    for folder in dict.fromkeys((Path(sys.path[0] or "."), Path.cwd())):
        yield from sorted(folder.glob("*.json"))
        yield from sorted(folder.glob("*/*.json"))


def _given_to_transformers() -> Iterator[str]:
    """What ``TrainingArguments(deepspeed=...)`` names."""
    module = sys.modules.get("transformers.training_args")
    arguments: Iterator[Any] = iter(()) if module is None else live_objects(module.TrainingArguments)
    return (one.deepspeed for one in arguments if isinstance(one.deepspeed, str))


def _section_of(path: Path) -> tuple[Any, ...]:
    """The section, if the file can be read and has one."""
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return ()
        text = path.read_text(encoding="utf-8")
        document = json.loads(text) if SECTION in text else None
    except (OSError, ValueError, RecursionError):
        return ()
    return (document[SECTION],) if isinstance(document, dict) and SECTION in document else ()
