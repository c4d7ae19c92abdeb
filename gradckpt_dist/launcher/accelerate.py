"""``gradckpt accelerate launch``: Accelerate's own launcher, whose configuration file may hold our section."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from gradckpt_dist.adapters import versions
from gradckpt_dist.api import CONFIG_VARIABLE
from gradckpt_dist.config import SECTION, Config, read_document, section_owners
from gradckpt_dist.errors import ConfigError

_NO_PREFIX = "\0"


def add_accelerate_parser(commands: Any) -> None:
    """Add ``accelerate launch`` to the command line; what follows is for Accelerate's own parser."""
    accelerate = commands.add_parser("accelerate", help="accelerate launch, with the plugin enabled in the script")
    actions = accelerate.add_subparsers(title="commands", required=True, metavar="launch")
    # No argument may look like an option here, --help included.
    launch_parser = actions.add_parser(
        "launch",
        help="the same arguments as accelerate launch; a `gradckpt` section in its YAML is read",
        prefix_chars=_NO_PREFIX,
        add_help=False,
    )
    launch_parser.add_argument("arguments", nargs=argparse.REMAINDER)
    launch_parser.set_defaults(execute=lambda parsed: launch(parsed.arguments))


def launch(arguments: Sequence[str]) -> None:
    """``accelerate launch ARGUMENTS``, the script being run by ``gradckpt run``.

    A ``gradckpt`` section at the top of Accelerate's configuration file (the default one included), or in its
    ``fsdp_config``, is the configuration; without one it is as for ``gradckpt run``. Accelerate reads a copy without
    it. Its launcher runs in this process, so that interrupts and exit codes are its own.

    Raises:
        ConfigError: Accelerate is missing, the section cannot be used, or what is launched is not Python.
    """
    versions.require("accelerate")
    from accelerate.commands.launch import launch_command, launch_command_parser  # noqa: PLC0415

    parser = launch_command_parser()
    parser.prog = "gradckpt accelerate launch"
    parsed = parser.parse_args(arguments)
    if parsed.no_python:
        raise ConfigError("--no_python starts a program, and the plugin acts on a Python script; leave one of them out")
    inner = ["run", *(["-m"] if parsed.module else []), parsed.training_script, *parsed.training_script_args]
    parsed.module, parsed.training_script, parsed.training_script_args = True, "gradckpt_dist", inner
    with _accelerates_own(_config_file(parsed)) as parsed.config_file:
        launch_command(parsed)


def _config_file(parsed: argparse.Namespace) -> str | None:
    """The file that Accelerate would read: the given one, else the default one unless ``--cpu`` is given."""
    from accelerate.commands.config.config_args import default_config_file  # noqa: PLC0415

    if parsed.config_file is not None:
        return str(parsed.config_file)
    return default_config_file if os.path.isfile(default_config_file) and not parsed.cpu else None


@contextmanager
def _accelerates_own(config_file: str | None) -> Iterator[str | None]:
    """The file for Accelerate: as given, or while this lasts a copy without our section, which the ranks then read."""
    document = None if config_file is None else read_document(Path(config_file))
    owners = section_owners(document)
    if config_file is None or not owners:
        yield config_file
        return
    path = Path(config_file).absolute()
    Config.from_file(path)
    for owner in owners:
        del owner[SECTION]
    os.environ[CONFIG_VARIABLE] = str(path)
    with tempfile.TemporaryDirectory(prefix="gradckpt-") as folder:
        copy = Path(folder, path.name)  # Accelerate's own errors name it
        text = json.dumps(document) if path.suffix == ".json" else yaml.safe_dump(document)
        copy.write_text(text, encoding="utf-8")
        yield str(copy)
