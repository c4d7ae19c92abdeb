"""The command line: ``gradckpt …``, the same as ``python -m gradckpt_dist …``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gradckpt_dist.bench.command import add_bench_parser
from gradckpt_dist.doctor.command import add_doctor_parser
from gradckpt_dist.errors import GradckptError
from gradckpt_dist.launcher.accelerate import add_accelerate_parser
from gradckpt_dist.launcher.script import run_script
from gradckpt_dist.version import __version__

EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 2 if this package refuses, with one line that says why."""
    parsed = _parser().parse_args(arguments)
    try:
        parsed.execute(parsed)
    except GradckptError as error:
        print(f"gradckpt: {type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gradckpt", description="Gradient-aware activation checkpointing.")
    parser.add_argument("--version", action="version", version=f"gradckpt {__version__}")
    # DeepSpeed's launcher puts it before `run`; it is for the script.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="run a training script with the plugin enabled, without a change to it",
        usage="gradckpt run [-h] [--config FILE] [-m] SCRIPT [ARGUMENTS …]",
    )
    run.add_argument("--config", metavar="FILE", help="YAML or JSON, its `gradckpt` section; default: GRADCKPT_CONFIG")
    run.add_argument("-m", "--module", action="store_true", help="SCRIPT is a module's name, as for python -m")
    run.add_argument("script", metavar="SCRIPT")
    run.add_argument("arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER)
    run.set_defaults(execute=_run)
    add_accelerate_parser(commands)
    add_doctor_parser(commands)
    add_bench_parser(commands)
    return parser


def _run(parsed: argparse.Namespace) -> None:
    from_launcher = [] if parsed.local_rank is None else [f"--local_rank={parsed.local_rank}"]
    run_script(parsed.script, [*from_launcher, *parsed.arguments], parsed.config, is_module=parsed.module)
