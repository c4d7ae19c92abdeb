"""What the demo's runs left behind, as the figures of its table and of summary.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]
LETTERS = {"keep": "K", "recompute": "R"}


class TooShortError(Exception):
    """The runs hold nothing to compare."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm.

    ``step_ratio``: the time of its steps over that of the plain arm's. ``held_bytes``: the most that a rank held for
    backward.
    """

    arm: str
    step_ratio: float
    held_bytes: int | None
    recomputed_blocks: int
    validation_loss: float


@dataclass(frozen=True, kw_only=True)
class Stay:
    """One mask: (first, last) steps of each time it held, the range of theta, and whether a decision chose it."""

    letters: str
    steps: tuple[tuple[int, int], ...]
    thetas: tuple[float, float] | None
    decided: bool

    def describe(self) -> str:
        """In words: when, and under which theta."""
        spans = ", ".join(f"{first}-{last}" for first, last in self.steps)
        if self.thetas is None:
            return f"steps {spans}"
        low, high = (f"{theta:.3g}" for theta in self.thetas)
        return f"steps {spans}, theta {low}" + ("" if low == high else f" to {high}")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The content of summary.json; design section 8 names the keys that tools read."""

    ranks: int
    blocks: int
    rows: tuple[Row, ...]
    masks_identical: bool
    decisions: int
    distinct_masks: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_lines(path: Path) -> list[Line]:
    """The complete lines of a JSON-lines file; none if it is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


def last_step(metrics: Path) -> int:
    """The last step that a run has written so far; 0 if none."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4096))
        steps = [json.loads(line).get("step", 0) for line in file.readlines()[1:] if line.endswith(b"\n")]
    return max(steps, default=0)


def of_event(lines: Iterable[Line], event: str) -> list[Line]:
    return [line for line in lines if line["event"] == event]


def turn_medians(metrics: Sequence[Line], pauses: Sequence[tuple[float, float]]) -> dict[int, float]:
    """The median step (seconds) of each turn that held a whole step; ``pauses`` lie between the turns.

    Steps and pauses are timed with ``time.monotonic``, which all processes of a machine share.
    """
    turns: dict[int, list[float]] = {}
    for step in of_event(metrics, "step"):
        if all(step["ended"] <= begin or step["started"] >= end for begin, end in pauses):
            turn = sum(end <= step["started"] for _, end in pauses)
            turns.setdefault(turn, []).append(step["seconds"])
    return {turn: statistics.median(seconds) for turn, seconds in turns.items()}


def step_ratio(arm: dict[int, float], plain: dict[int, float]) -> float:
    """The median over turns of the arm's step time over the plain arm's in the turn next to it.

    So other load on the machine, which comes and goes, meets both. Runs too short to share a turn are compared whole.

    Raises:
        TooShortError: no step of one of them ran undisturbed.
    """
    if not arm or not plain:
        raise TooShortError("no step ran without a pause; let the turns be longer (--slice-seconds)")
    shared = [arm[turn] / plain[turn] for turn in arm.keys() & plain.keys()]
    return statistics.median(shared or [statistics.median(arm.values()) / statistics.median(plain.values())])


def most_held_bytes(log: Sequence[Line]) -> int | None:
    """The largest ``held_bytes`` that was measured; None if none was."""
    measured = (line["held_bytes"] for line in of_event(log, "decision"))
    return max((held for held in measured if held is not None), default=None)


def validation_loss(metrics: Sequence[Line]) -> float:
    loss: float = of_event(metrics, "validation")[-1]["loss"]
    return loss


def masks(log: Sequence[Line]) -> list[Line]:
    """The lines that tell of a mask: the one at the start, then each decision."""
    return [line for line in log if line["event"] in ("start", "decision")]


def count_blocks(log: Sequence[Line]) -> int:
    return len(masks(log)[0]["mask"])


def recomputed_blocks(log: Sequence[Line]) -> int:
    """How many blocks the last mask recomputes."""
    last: list[str] = masks(log)[-1]["mask"]
    return last.count("recompute")


def masks_identical(logs: Sequence[Sequence[Line]]) -> bool:
    """Whether all ranks' logs hold the same decisions, at least one, at the same steps."""
    chosen = [[(line["step"], line["epoch"], line["digest"]) for line in of_event(log, "decision")] for log in logs]
    return bool(chosen and chosen[0]) and all(one == chosen[0] for one in chosen)


def stays(log: Sequence[Line], last_step: int) -> list[Stay]:
    """The distinct masks of a log in the order in which they first came; the mask at the start holds from step 1."""
    turns = masks(log)
    first_steps = [line.get("step", 1) for line in turns]
    ends = [step - 1 for step in first_steps[1:]] + [last_step]
    by_mask: dict[str, list[int]] = {}
    for index, line in enumerate(turns):
        letters = "".join(LETTERS.get(storage, "?") for storage in line["mask"])
        by_mask.setdefault(letters, []).append(index)
    return [
        Stay(
            letters=letters,
            steps=joined((first_steps[index], ends[index]) for index in indices),
            thetas=extremes(turns[index].get("theta") for index in indices),
            decided=any(turns[index]["event"] == "decision" for index in indices),
        )
        for letters, indices in by_mask.items()
    ]


def joined(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Spans that follow each other without a gap as one; empty ones are left out."""
    result: list[tuple[int, int]] = []
    for first, last in spans:
        if result and result[-1][1] == first - 1:
            result[-1] = (result[-1][0], last)
        elif first <= last:
            result.append((first, last))
    return tuple(result)


def extremes(values: Iterable[float | None]) -> tuple[float, float] | None:
    present = [value for value in values if value is not None]
    return (min(present), max(present)) if present else None
