"""The event log: one JSON object a line, ``event`` naming its kind. The readers are in ``report``."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger("gradckpt_dist")


class EventLog:
    """Appends to ``<log_dir>/gradckpt.jsonl``; other ranks than 0, to a file of their own.

    A log that cannot be written (a full disk) warns once and stops; training goes on.
    """

    def __init__(self, log_dir: str | None, rank: int, *, all_ranks: bool) -> None:
        self._path: Path | None = None
        if log_dir is not None and (rank == 0 or all_ranks):
            self._path = Path(log_dir) / ("gradckpt.jsonl" if rank == 0 else f"gradckpt.rank{rank}.jsonl")

    @property
    def is_open(self) -> bool:
        """Whether lines are written: there is a folder for them, this rank has part in it, and it could be written."""
        return self._path is not None

    def write(self, event: str, **fields: Any) -> None:
        """Append one line."""
        if self._path is None:
            return
        line = json.dumps({"event": event, **fields}, allow_nan=False)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            logger.warning("gradckpt: the event log %s cannot be written (%s); it stops here", self._path, error)
            self._path = None
