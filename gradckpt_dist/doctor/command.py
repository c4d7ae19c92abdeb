"""``gradckpt doctor [--json]``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from gradckpt_dist.doctor.diagnosis import diagnose

_COLOURS = {"yes": "green", "slowly": "yellow", "no": "red"}


def add_doctor_parser(commands: Any) -> None:
    """Add ``doctor`` to the command line."""
    doctor = commands.add_parser("doctor", help="what is installed here, and what of this package will work with it")
    doctor.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    doctor.set_defaults(execute=_execute)


def _execute(parsed: argparse.Namespace) -> None:
    diagnosis = diagnose()
    if parsed.json:
        print(json.dumps(diagnosis))
    else:
        _show(diagnosis, Console())


def _show(diagnosis: dict[str, Any], console: Console) -> None:
    machine = diagnosis["machine"]
    console.print(", ".join(f"{name} {version}" for name, version in diagnosis["versions"].items()))
    console.print(f"{machine['system']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.1f} GiB")
    console.print(f"devices: {', '.join(machine['devices']) or 'none but the CPU'}")
    for compiler in diagnosis["compilers"]:
        console.print(f"compiler for {compiler['device']}: {compiler['found'] or 'none; ' + compiler['advice']}")
    frameworks = Table("framework", "here", "tested", "note")
    for found in diagnosis["frameworks"]:
        frameworks.add_row(found["name"], found["version"] or "-", found["tested"], _plain(found["note"]))
    console.print(frameworks)
    parts = Table("part", "works", "why")
    for finding in diagnosis["findings"]:
        colour = _COLOURS[finding["works"]]
        parts.add_row(finding["part"], f"[{colour}]{finding['works']}[/{colour}]", _plain(finding["why"]))
    console.print(parts)


def _plain(text: str) -> str:
    """For rich, which would take the brackets of an extra for markup."""
    return text.replace("[", r"\[")
