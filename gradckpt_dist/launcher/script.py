"""``python -m gradckpt_dist run train.py``: a script that knows nothing of this package, run with it."""

from __future__ import annotations

import gc
import logging
import runpy
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from gradckpt_dist.api import enable, resolve_config
from gradckpt_dist.blocks.attribute import is_switched
from gradckpt_dist.config import Config
from gradckpt_dist.engine import Engine
from gradckpt_dist.errors import BlocksNotFoundError, ConfigError

logger = logging.getLogger("gradckpt_dist")

_GLOO_SETTLES_SECONDS = 0.05


def run_script(script: str, arguments: Sequence[str], config_path: str | None) -> None:
    """Run ``script`` as ``__main__``, with the plugin enabled on the first model that trains.

    ``sys.argv``, ``sys.path[0]``, exit codes, tracebacks and interrupts are those of ``python script ARGS``.

    Raises:
        ConfigError: the script or the configuration file is not there, or the configuration cannot be used.
    """
    config = resolve_config(config_path)
    _show_messages()
    logger.setLevel(config.log_level.upper())
    path = Path(script).absolute()
    if not path.is_file():
        raise ConfigError(f"{script}: there is no such script; give the path of a Python file, then its arguments")
    watch = ModelWatch(config if config_path is not None else None)
    sys.argv = [script, *arguments]
    sys.path[0] = str(path.resolve().parent)
    sys.excepthook = _ScriptTraceback(str(path))
    if config.enabled or config_path is None:
        watch.arm()
    runpy.run_path(str(path), run_name="__main__")
    watch.report()
    del watch
    # Wrapped models, in reference cycles, hold process groups; a thread of gloo's that outlives the interpreter aborts
    # the process. Such a thread may still be letting go of its last collective, for which it needs Python's lock.
    time.sleep(_GLOO_SETTLES_SECONDS)
    gc.collect()


def _show_messages() -> None:
    """Print this package's own log lines to stderr; the script's logging is left alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.propagate = False


class ModelWatch:
    """Enables the plugin at the first forward of a module that is training, has gradients on and owns blocks.

    Without a ``config``, the section in the framework's own configuration counts, or else ``GRADCKPT_CONFIG``.
    """

    def __init__(self, config: Config | None) -> None:
        self._config = config
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        self._passed_over: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._reason = "no module ran forward in training mode with gradients on"
        self.engine: Engine | None = None

    def arm(self) -> None:
        """Watch every module's forward until the model is found; after that nothing is left behind."""
        self._handle = register_module_forward_pre_hook(self._before_forward)

    def report(self) -> None:
        """Say so if the script has ended and no model was found."""
        if self._handle is not None:
            self._disarm()
            logger.warning("gradckpt: the script ended without a model to act on: %s", self._reason)

    # Without this a compiled root compiles the hook itself, and enabling never happens.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_forward(self, module: nn.Module, _: Any) -> None:
        if self._handle is None or not (module.training and torch.is_grad_enabled()) or module in self._passed_over:
            return
        if any(is_switched(child) for child in module.modules()):
            self._disarm()
            logger.info("gradckpt: the script enables the plugin itself; its own call counts")
            return
        try:
            self.engine = enable(module, self._config)
        except BlocksNotFoundError as error:
            if not self._passed_over:
                self._reason = str(error)
            self._passed_over.add(module)
            return
        self._disarm()
        logger.setLevel(self.engine.config.log_level.upper())
        self.engine.join_forward()

    def _disarm(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class _ScriptTraceback:
    """Prints an uncaught error's traceback from the script's own first frame on."""

    def __init__(self, script: str) -> None:
        self._script = script
        self._print = sys.excepthook

    def __call__(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        frame = traceback
        while frame is not None and frame.tb_frame.f_code.co_filename != self._script:
            frame = frame.tb_next
        self._print(kind, error.with_traceback(frame), frame)
