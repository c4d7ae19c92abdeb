"""DeepSpeed's own modules, which are imported only once the script has imported DeepSpeed."""

from __future__ import annotations

import importlib
from typing import Any


def part(name: str) -> Any:
    """The module ``deepspeed.<name>``."""
    return importlib.import_module(f"deepspeed.{name}")


def checkpointing() -> Any:
    """What scripts know as ``deepspeed.checkpointing``."""
    return part("runtime.activation_checkpointing.checkpointing")
