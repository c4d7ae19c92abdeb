"""The frameworks that adapters know: which versions were tested, and what to say where there is another or none."""

from __future__ import annotations

import importlib.metadata
import logging
import re
from dataclasses import dataclass
from functools import cache

from gradckpt_dist.errors import ConfigError

logger = logging.getLogger("gradckpt_dist")


@dataclass(frozen=True, kw_only=True)
class Support:
    """Versions from ``lowest`` up to, and without, ``below`` should do; ``tested`` is the one that the tests run."""

    tested: str
    lowest: str
    below: str

    def covers(self, version: str) -> bool:
        """Whether ``version`` is in the range."""
        return _numbers(self.lowest) <= _numbers(version) < _numbers(self.below)


FRAMEWORKS = {
    "accelerate": Support(tested="1.15.0", lowest="1.15", below="2"),
    "deepspeed": Support(tested="0.19.8", lowest="0.19", below="0.20"),
    "transformers": Support(tested="5.23.0", lowest="5.23", below="6"),
    "torchtitan": Support(tested="0.3.0", lowest="0.3", below="0.4"),
}
"""By distribution, which is also the name of the module and of this package's extra."""


def installed_version(framework: str) -> str | None:
    """The version of an installed framework, which is not imported; None if it is missing."""
    try:
        return importlib.metadata.version(framework)
    except importlib.metadata.PackageNotFoundError:
        return None


def require(framework: str) -> None:
    """Go on only where ``framework`` is installed; of an untested version, say so once.

    Raises:
        ConfigError: it is missing; the message names the extra that brings it.
    """
    if installed_version(framework) is None:
        raise ConfigError(missing(framework))
    warn_if_untested(framework)


@cache
def warn_if_untested(framework: str) -> None:
    """One log line, once a process, if the installed version is outside of the tested range."""
    if (line := untested(framework)) is not None:
        logger.warning("gradckpt: %s", line)


def missing(framework: str) -> str:
    """What to say where a framework is needed and not installed."""
    return f"{framework} is not installed; pip install 'gradckpt_dist[{framework}]'"


def untested(framework: str) -> str | None:
    """What to say of an installed version that is too old or too new; None if there is nothing to say."""
    version, support = installed_version(framework), FRAMEWORKS.get(framework)
    if version is None or support is None or support.covers(version):
        return None
    age = "older" if _numbers(version) < _numbers(support.lowest) else "newer"
    return (
        f"{framework} {version} is {age} than what was tested ({support.tested}; {support.lowest} or later, below "
        f"{support.below}); if something fails, pip install 'gradckpt_dist[{framework}]'"
    )


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in release.group().split(".")) if release else ()
