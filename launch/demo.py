"""Trains the same small GPT three times on real text, on two ranks, and shows what gradckpt saved and what it cost.

    python launch/demo.py

The arms: ``plain`` (train_text.py as it is), ``full`` (every block recomputed), ``gradckpt`` (the blocks whose
gradients matter most are recomputed, so many that half the memory suffices). They take turns, so that their times
compare. Everything they write lies in runs/demo: logs, metrics, configurations, event logs, summary.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from demo_arms import Arm, ArmFailedError, take_turns
from demo_summary import (
    Row,
    Stay,
    Summary,
    TooShortError,
    count_blocks,
    last_step,
    masks_identical,
    most_held_bytes,
    of_event,
    read_lines,
    recomputed_blocks,
    stays,
    step_ratio,
    turn_medians,
    validation_loss,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = Path("launch") / "train_text.py"
PROBE_STEPS = 40


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Where the runs go, and what they have in common."""

    directory: Path
    ranks: int
    steps: int
    slice_seconds: float
    memory_budget: float
    arguments: tuple[str, ...]

    def metrics(self, arm: str) -> Path:
        return self.directory / f"{arm}.metrics.jsonl"

    def arm(self, name: str, *, log_dir: Path | None = None, steps: int | None = None, **policy: Any) -> Arm:
        """A run of the script under torchrun; with ``policy``, under gradckpt with that configuration."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
        if policy:
            config = self.directory / f"{name}.yaml"
            section = {**policy, "log_dir": str(log_dir), "log_level": "debug"}
            config.write_text(yaml.safe_dump({"gradckpt": section}, sort_keys=False), encoding="utf-8")
            command += ["-m", "gradckpt_dist", "run", "--config", str(config)]
        command += [str(SCRIPT), "--parallel", "ddp", "--device", "cpu", "--steps", str(steps or self.steps)]
        command += ["--metrics", str(self.metrics(name)), *self.arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return Arm(name, command, self.directory / f"{name}.log", environment, REPOSITORY)


def run_arms(demo: Demo, console: Console) -> list[Arm]:
    """Train all arms to their end; what they write lies in the demo's directory.

    Raises:
        ArmFailedError: one ended with an error.
    """
    empty(demo.directory)
    held = demo.directory / "plain"
    probe = demo.arm("probe", log_dir=held, steps=PROBE_STEPS, policy="static", every_n=0, interval=10)
    arms = [
        demo.arm("plain"),
        demo.arm("full", log_dir=demo.directory / "full", policy="static", every_n=1, interval=25),
        demo.arm("gradckpt", log_dir=demo.directory, policy="threshold", memory_budget=demo.memory_budget, interval=25),
    ]
    with progress_of(demo, [probe, *arms], console) as show:
        take_turns([probe], demo.slice_seconds, show)
        take_turns(arms, demo.slice_seconds, show)
    return arms


def empty(directory: Path) -> None:
    """Remove what an earlier demo left: logs are appended to."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in [*directory.glob("*.jsonl"), *directory.glob("full/*.jsonl"), *directory.glob("plain/*.jsonl")]:
        path.unlink()
    (directory / "summary.json").unlink(missing_ok=True)


@contextmanager
def progress_of(demo: Demo, arms: Sequence[Arm], console: Console) -> Iterator[Callable[[Arm], None]]:
    columns = (TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    if not console.is_terminal:
        console.print(f"training {', '.join(arm.name for arm in arms)} on {demo.ranks} ranks; about three minutes")
    with Progress(
        *columns, TimeElapsedColumn(), console=console, refresh_per_second=2, disable=not console.is_terminal
    ) as progress:
        tasks = {
            arm.name: progress.add_task(arm.name, total=PROBE_STEPS if arm.name == "probe" else demo.steps)
            for arm in arms
        }
        yield lambda arm: progress.update(tasks[arm.name], completed=last_step(demo.metrics(arm.name)))


def summarise(demo: Demo, arms: Sequence[Arm]) -> tuple[Summary, list[Stay]]:
    """Read what the runs wrote."""
    logs = {
        "plain": read_lines(demo.directory / "plain" / "gradckpt.jsonl"),
        "full": read_lines(demo.directory / "full" / "gradckpt.jsonl"),
        "gradckpt": read_lines(demo.directory / "gradckpt.jsonl"),
    }
    metrics = {arm.name: read_lines(demo.metrics(arm.name)) for arm in arms}
    seconds = {arm.name: turn_medians(metrics[arm.name], arm.pauses) for arm in arms}
    rows = tuple(
        Row(
            arm=name,
            step_ratio=step_ratio(seconds[name], seconds["plain"]),
            held_bytes=most_held_bytes(logs[name]),
            recomputed_blocks=recomputed_blocks(logs[name]),
            validation_loss=validation_loss(metrics[name]),
        )
        for name in seconds
    )
    others = [read_lines(demo.directory / f"gradckpt.rank{rank}.jsonl") for rank in range(1, demo.ranks)]
    moves = stays(logs["gradckpt"], demo.steps)
    summary = Summary(
        ranks=demo.ranks,
        blocks=count_blocks(logs["gradckpt"]),
        rows=rows,
        masks_identical=masks_identical([logs["gradckpt"], *others]),
        decisions=len(of_event(logs["gradckpt"], "decision")),
        distinct_masks=len({stay.letters for stay in moves if stay.decided}),
    )
    return summary, moves


def write(summary: Summary, demo: Demo, arms: Sequence[Arm]) -> Path:
    start = of_event(read_lines(demo.directory / "gradckpt.jsonl"), "start")[0]
    versions = {"python": platform.python_version(), "torch": start["torch"], "gradckpt_dist": start["version"]}
    path = demo.directory / "summary.json"
    content = {
        **summary.to_dict(),
        "name": "demo",
        "steps": demo.steps,
        "versions": versions,
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
        "command": shlex.join([sys.executable, *sys.argv]),
        "arms": {arm.name: shlex.join(arm.command) for arm in arms},
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def show_summary(summary: Summary, moves: Sequence[Stay], demo: Demo, console: Console) -> None:
    table = Table(title=f"{demo.steps} steps of a GPT of {summary.blocks} blocks on {summary.ranks} ranks (DDP)")
    table.add_column("arm")
    for title in ("step time\nto plain", "held for\nbackward, MiB", "blocks\nrecomputed", "validation loss\n(nats)"):
        table.add_column(title, justify="right")
    for row in summary.rows:
        held = "-" if row.held_bytes is None else f"{row.held_bytes / 2**20:.1f}"
        blocks = f"{row.recomputed_blocks} of {summary.blocks}"
        table.add_row(row.arm, f"{row.step_ratio:.2f}", held, blocks, f"{row.validation_loss:.4f}")
    console.print(table)
    agreed = "the same on all ranks" if summary.masks_identical else "NOT the same on all ranks"
    console.print(
        f"{summary.decisions} decisions, {agreed}. How the mask moved (R recompute, K keep; first block first):"
    )
    for stay in moves:
        console.print(f"  {stay.letters}  {stay.describe()}", highlight=False)
    console.print(
        "Try next: python launch/demo.py --memory-budget 0.35, or your own script: "
        f"torchrun --nproc-per-node={demo.ranks} -m gradckpt_dist run your_script.py",
        highlight=False,
        soft_wrap=True,
    )


def parse_arguments() -> Demo:
    parser = argparse.ArgumentParser(
        description="Train a small GPT plainly, fully recomputed and under gradckpt.",
        epilog="Other arguments go to train_text.py.",
    )
    parser.add_argument("--steps", type=int, default=800, help="of each arm (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--memory-budget", type=float, default=0.5, help="0 recomputes all, 1 keeps all (default: %(default)s)"
    )
    parser.add_argument("--slice-seconds", type=float, default=2.5, help="length of a turn (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), metavar="DIRECTORY", help="default: runs/demo"
    )
    options, script_arguments = parser.parse_known_args()
    if min(options.steps, options.ranks, options.slice_seconds) <= 0:
        parser.error("--steps, --ranks and --slice-seconds must be above 0")
    if not 0 <= options.memory_budget <= 1:
        parser.error(f"--memory-budget {options.memory_budget} is out of range; give 0 to 1")
    if not Path("/proc/self/stat").exists():
        parser.error("the demo lets its runs take turns by way of /proc, which only Linux has")
    return Demo(
        directory=options.output.resolve(),
        ranks=options.ranks,
        steps=options.steps,
        slice_seconds=options.slice_seconds,
        memory_budget=options.memory_budget,
        arguments=tuple(script_arguments),
    )


def end_on_signal(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def main() -> int:
    demo = parse_arguments()
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, end_on_signal)
    try:
        arms = run_arms(demo, console)
        summary, moves = summarise(demo, arms)
    except (ArmFailedError, TooShortError) as error:
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; all runs are ended")
        return 128 + signal.SIGINT
    write(summary, demo, arms)
    show_summary(summary, moves, demo, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
