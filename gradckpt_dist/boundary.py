"""Where one training step ends and the next begins, seen from the root module alone."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch._compile import _disable_dynamo  # torch.compiler.disable would import all of torch._dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from gradckpt_dist.errors import ConfigError

logger = logging.getLogger("gradckpt_dist")

_FORWARDS_WITHOUT_STEP = 256

# Takes anything, returns None, and is pickled without this package: what a copy of the model carries instead of us.
_INERT = contextlib.nullcontext().__exit__


class BoundaryListener(Protocol):
    """Who wants to know."""

    def begin_step(self) -> None:
        """The first training forward after an optimizer step is about to run."""

    def end_step(self) -> None:
        """An optimizer has stepped, the first one since the step began; gradients are still there."""

    def begin_forward(self) -> None:
        """A training forward of the root is about to run: one for each micro-batch."""

    def end_forward(self) -> None:
        """The root's forward has ended, by return or by exception."""

    def pause(self) -> None:
        """A forward without gradients or in evaluation is about to run."""


class StepBoundary:
    """Tells the listener of forwards in training with gradients on, and of the first one after an optimizer step.

    Any optimizer's step counts unless one is given; a step of many groups (ZeRO) counts once.
    """

    def __init__(self, root: nn.Module, optimizer: Optimizer | None, listener: BoundaryListener) -> None:
        self._listener = listener
        self._stepped = True
        self._forwards_since_step = 0
        self._fewest_forwards = _FORWARDS_WITHOUT_STEP
        self._root = root
        stepped = _weak_method(self._on_optimizer_step)
        self._handles = [
            root.register_forward_pre_hook(_Hook(self.before_forward), prepend=True),
            root.register_forward_hook(_Hook(self._after_forward), always_call=True),
            optimizer.register_step_post_hook(stepped) if optimizer else register_optimizer_step_post_hook(stepped),
        ]

    @property
    def between_steps(self) -> bool:
        """Whether the step that began last has ended."""
        return self._stepped

    def remove(self) -> None:
        """Take every hook away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def before_forward(self) -> None:
        """What the root's forward pre-hook does."""
        if not (self._root.training and torch.is_grad_enabled()):
            self._listener.pause()
            return
        if self._stepped:
            self._begin_step()
        self._listener.begin_forward()
        self._forwards_since_step += 1
        if self._forwards_since_step == _FORWARDS_WITHOUT_STEP:
            logger.warning(
                "gradckpt: %d training forwards without an optimizer step seen, so no decision is taken; "
                "step a torch.optim.Optimizer, or give it as enable(..., optimizer=...)",
                _FORWARDS_WITHOUT_STEP,
            )

    def miss_forward(self, *, synchronised: bool) -> None:
        """Follow a training forward of other ranks in which this one has no part, as it has run out of data.

        Their step is taken to end with a forward whose gradients are ``synchronised``, the first one of these for which
        the step has as many forwards as the shortest so far.
        """
        if self._stepped:
            self._begin_step()
        self._forwards_since_step += 1
        self._stepped = synchronised and self._forwards_since_step >= self._fewest_forwards

    def _begin_step(self) -> None:
        self._stepped = False
        self._forwards_since_step = 0
        self._listener.begin_step()

    def _after_forward(self) -> None:
        self._listener.end_forward()

    def _on_optimizer_step(self) -> None:
        if not self._stepped:
            self._stepped = True
            self._fewest_forwards = min(self._fewest_forwards, self._forwards_since_step)
            self._listener.end_step()


def stepping(optimizer: Any) -> Optimizer:
    """The optimizer inside of the wrappers of Accelerate and DeepSpeed, which take no hooks.

    Raises:
        ConfigError: it is none.
    """
    inner = optimizer
    while not hasattr(inner, "_optimizer_step_post_hooks") and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not (isinstance(inner, Optimizer) and hasattr(inner, "_optimizer_step_post_hooks")):
        raise ConfigError(
            f"optimizer: a {type(optimizer).__name__} is not allowed; give a torch.optim.Optimizer, or a wrapper that "
            "has one as its attribute `optimizer`, or leave it out: then any optimizer's step counts"
        )
    return inner


class _Hook:
    """A module hook that neither a deep copy nor a pickle of the module takes along."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    @_disable_dynamo
    def __call__(self, *_: Any) -> None:
        self._call()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _INERT

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")


def _weak_method(method: Callable[[], None]) -> Callable[..., None]:
    reference = weakref.WeakMethod(method)

    def call(*_: Any) -> None:
        target = reference()
        if target is not None:
            target()

    return call
