"""``gradckpt bench NAME [--json] [--quick] [--output FILE]``; ``frontier`` and ``overhead`` have ``--wide``, too."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from gradckpt_dist.bench.frontier import bench_frontier, bench_frontier_coarse, bench_frontier_wide, draw_frontier
from gradckpt_dist.bench.impact import bench_impact
from gradckpt_dist.bench.overhead import bench_overhead, bench_overhead_wide
from gradckpt_dist.bench.planner import bench_planner
from gradckpt_dist.bench.record import progress, write
from gradckpt_dist.bench.scale import bench_scale
from gradckpt_dist.bench.storage import bench_storage
from gradckpt_dist.errors import GradckptError

_PIPED_COLUMNS = 240


class Bench(Protocol):
    """Measures, and returns the object that ``record`` makes."""

    def __call__(self, *, quick: bool) -> dict[str, Any]: ...


BENCHES: dict[str, tuple[Bench, str]] = {
    "frontier": (bench_frontier, "step time against peak bytes, of this package and of its peers"),
    "impact": (bench_impact, "what the impact metrics predict of gradient errors, against the true ones"),
    "overhead": (bench_overhead, "the plugin's own cost, against a pinned mask"),
    "planner": (bench_planner, "the budget policy's optimiser: seconds, and the gap to the optimum"),
    "scale": (bench_scale, "the agreement's bytes, collectives and seconds, to 32 real and 16,384 simulated ranks"),
    "storage": (bench_storage, "bytes, seconds and gradient error of every storage, against keep"),
}

OPTIONS: dict[str, tuple[tuple[str, Bench, str], ...]] = {
    "frontier": (
        ("--coarse", bench_frontier_coarse, "fewer budgets and tolerances: in most of an hour"),
        ("--wide", bench_frontier_wide, "full recompute's peak alone, at d = 1024: in most of an hour"),
    ),
    "overhead": (("--wide", bench_overhead_wide, "at d = 512, which takes a quarter of an hour"),),
}
"""Other sizes of a bench; of those that take hours, shorter ones."""

FIGURES: dict[str, Callable[[dict[str, Any], Path], list[Path]]] = {"frontier": draw_frontier}
"""Benches whose object is drawn, beside the file that it is written to."""


def add_bench_parser(commands: Any) -> None:
    """Add ``bench`` and its benches to the command line."""
    bench = commands.add_parser("bench", help="measure on this machine")
    names = bench.add_subparsers(title="benches", required=True, metavar="NAME")
    for name, (run, text) in BENCHES.items():
        parser = names.add_parser(name, help=text)
        parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        parser.add_argument("--quick", action="store_true", help="under a minute, for tests; the figures are rough")
        parser.add_argument(
            "--output", type=Path, metavar="FILE", help="write the JSON object to a file; figures go beside it"
        )
        parser.set_defaults(execute=_execute(name), run=run)
        options = parser.add_mutually_exclusive_group()
        for option, other, told in OPTIONS.get(name, ()):
            options.add_argument(option, dest="run", action="store_const", const=other, help=told)


def _execute(name: str) -> Callable[[argparse.Namespace], None]:
    def execute(parsed: argparse.Namespace) -> None:
        result = parsed.run(quick=parsed.quick)
        if parsed.output is not None:
            write(result, parsed.output)
            _draw(name, result, parsed.output)
        if parsed.json:
            print(json.dumps(result))
        else:
            _show(result)

    return execute


def _draw(name: str, result: dict[str, Any], output: Path) -> None:
    if name not in FIGURES:
        return
    try:
        progress(f"drawn: {', '.join(map(str, FIGURES[name](result, output)))}")
    except GradckptError as error:
        progress(f"no figure: {error}")  # the measurements stand without it


def _show(result: dict[str, Any]) -> None:
    # rich takes a pipe for 80 columns and would cut the table's figures off.
    console = Console(width=None if sys.stdout.isatty() else _PIPED_COLUMNS)
    figures = {key: value for key, value in result.items() if key not in {"rows", "versions", "machine"}}
    for key, value in figures.items():
        console.print(f"{key}: {value}")
    if result["rows"]:
        table = Table(*result["rows"][0])
        for row in result["rows"]:
            table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
        console.print(table)
