"""``python -m gradckpt_dist run train.py``: a script that knows nothing of this package, run with it."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import runpy
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from gradckpt_dist.adapters import versions
from gradckpt_dist.adapters.accelerate_checkpoint import remember_loads
from gradckpt_dist.api import ConfigLike, enable, resolve_config
from gradckpt_dist.blocks.attribute import is_switched
from gradckpt_dist.engine import Engine
from gradckpt_dist.errors import BlocksNotFoundError, ConfigError, ConflictError, GradckptError

logger = logging.getLogger("gradckpt_dist")

_GLOO_SETTLES_SECONDS = 0.05
_SCRIPT_ENABLES = "gradckpt: the script enables the plugin itself; its own call counts"


def run_script(script: str, arguments: Sequence[str], config_path: str | None, *, is_module: bool = False) -> None:
    """Run ``script`` as ``__main__``, with the plugin enabled on the first model that trains.

    ``sys.argv``, ``sys.path[0]``, exit codes, tracebacks and interrupts are those of ``python script ARGS``, or of
    ``python -m script ARGS`` if it ``is_module``.

    Raises:
        ConfigError: the script or the configuration file is not there, or the configuration cannot be used.
    """
    config = resolve_config(config_path)
    _show_messages()
    logger.setLevel(config.log_level.upper())
    if is_module:
        sys.path[0] = os.getcwd()
        path = _module_file(script)
    else:
        path = _script_file(script)
        sys.path[0] = str(path.resolve().parent)
    watch = ModelWatch(config if config_path is not None else None, on_enabled=_tell_trainer)
    sys.argv = [script, *arguments]
    sys.excepthook = _ScriptTraceback(str(path))
    if config.enabled or config_path is None:
        watch.arm()
        remember_loads()
    if is_module:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(path), run_name="__main__")
    watch.report()
    del watch
    # Wrapped models, in reference cycles, hold process groups; a thread of gloo's that outlives the interpreter aborts
    # the process. Such a thread may still be letting go of its last collective, for which it needs Python's lock.
    time.sleep(_GLOO_SETTLES_SECONDS)
    gc.collect()


def _script_file(script: str) -> Path:
    path = Path(script).absolute()
    if not path.is_file():
        raise ConfigError(f"{script}: there is no such script; give the path of a Python file, then its arguments")
    return path


def _module_file(name: str) -> Path:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:  # a package is run by its __main__
            spec = importlib.util.find_spec(f"{name}.__main__")
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise ConfigError(f"{name}: there is no such module; give a name that `python -m` would find from here")
    return Path(spec.origin)


def _show_messages() -> None:
    """Print this package's own log lines to stderr; the script's logging is left alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.propagate = False


def _tell_trainer(engine: Engine, root: nn.Module) -> None:
    """If a transformers ``Trainer`` is at work, its trackers and its checkpoints receive what a callback gives them."""
    if "transformers.trainer" in sys.modules:
        versions.warn_if_untested("transformers")
        from gradckpt_dist.launcher.trainer import follow  # noqa: PLC0415

        follow(engine, root)


class ModelWatch:
    """Enables the plugin at the first forward of a module that is training, has gradients on and owns blocks.

    Without a ``config``, the section in the framework's own configuration counts, or else ``GRADCKPT_CONFIG``. With
    ``model``: of one that is it or holds it, which has to own blocks. ``on_enabled`` is called with the engine and that
    module before its forward begins. One watch is armed at a time, the latest.
    """

    _armed: ClassVar[ModelWatch | None] = None

    def __init__(
        self,
        config: ConfigLike,
        *,
        model: nn.Module | None = None,
        on_enabled: Callable[[Engine, nn.Module], None] | None = None,
    ) -> None:
        self._config = config
        self._model = model
        self._on_enabled = on_enabled
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        self._passed_over: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._reason = "no module ran forward in training mode with gradients on"
        self.engine: Engine | None = None

    def arm(self) -> None:
        """Watch every module's forward until the model is found; after that nothing is left behind."""
        if ModelWatch._armed is not None:
            ModelWatch._armed.disarm()
            logger.info(_SCRIPT_ENABLES)
        ModelWatch._armed = self
        self._handle = register_module_forward_pre_hook(self._before_forward)

    def report(self) -> None:
        """Say so if the script has ended and no model was found."""
        if self._handle is not None:
            self.disarm()
            logger.warning("gradckpt: the script ended without a model to act on: %s", self._reason)

    # Without this a compiled root compiles the hook itself, and enabling never happens.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_forward(self, module: nn.Module, _: Any) -> None:
        if self._handle is None or not (module.training and torch.is_grad_enabled()) or module in self._passed_over:
            return
        if self._model is not None and not any(part is self._model for part in module.modules()):
            self._passed_over.add(module)
            return
        if any(is_switched(child) for child in module.modules()):
            self._find_switched(module)
            return
        try:
            self.engine = enable(module, self._config)
        except GradckptError as error:
            if self._model is not None or not isinstance(error, BlocksNotFoundError):
                self.disarm()
                raise
            if not self._passed_over:
                self._reason = str(error)
            self._passed_over.add(module)
            return
        self.disarm()
        logger.setLevel(self.engine.config.log_level.upper())
        if self._on_enabled is not None:
            self._on_enabled(self.engine, module)
        self.engine.join_forward()

    def _find_switched(self, module: nn.Module) -> None:
        self.disarm()
        if self._model is not None:
            raise ConflictError(
                f"the plugin is enabled on this {type(module).__name__} already; leave out enable() or the callback"
            )
        logger.info(_SCRIPT_ENABLES)

    def disarm(self) -> None:
        """Watch no longer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            ModelWatch._armed = None


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
