"""One dispatch in front of a block, which can be taken away again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from gradckpt_dist.blocks import frameworks
from gradckpt_dist.blocks.attribute import Call, SwitchedForward, is_switched
from gradckpt_dist.blocks.caches import CacheGuard
from gradckpt_dist.blocks.discovery import Block, BlockKind
from gradckpt_dist.errors import ConflictError

_ABSENT = object()


class Dispatch(Protocol):
    """What runs a block from now on."""

    @property
    def reruns(self) -> bool:
        """Whether the storage in force calls ``forward`` again in backward."""
        ...

    def __call__(self, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block once by ``forward(*args, **kwargs)`` and return its result.

        ``forward`` is one plain call of the block. Hooks of the block lie outside of it and run once; those of a
        compiled block are a part of its compiled code, and run with every call of ``forward``.
        """
        ...


def install_all(switches: Sequence[BlockSwitch]) -> None:
    """Install every switch.

    Raises:
        ConflictError: a block is switched already; then nothing has been changed.
    """
    installed: list[BlockSwitch] = []
    try:
        for switch in switches:
            switch.install()
            installed.append(switch)
    except BaseException:
        for switch in installed:
            switch.undo()
        raise


class BlockSwitch:
    """Puts a dispatch in front of one block's forward.

    One attribute of the block's own ``__dict__`` is replaced, and put back by ``undo``. Nothing is wrapped: names,
    ``state_dict`` keys and hooks stay. A deep copy or a pickle of the block runs its own forward without the dispatch.
    """

    def __init__(self, block: Block, dispatch: Dispatch) -> None:
        self.block = block
        self._dispatch = dispatch
        self._attribute = "_compiled_call_impl" if block.kind is BlockKind.COMPILED else "forward"
        self._forward: SwitchedForward | None = None
        self._caches = CacheGuard(_layer(block.module))
        self._native = tuple(m for m in block.module.modules() if frameworks.is_transformers_layer(m))
        self._plain_suffices = not self._native and block.kind is not BlockKind.CHECKPOINT_WRAPPER

    def install(self) -> None:
        """Route every call of the block through the dispatch, from the next one on.

        Raises:
            ConflictError: the block, or a module inside it, is already switched.
        """
        module = self.block.module
        if any(is_switched(part) for part in module.modules()):
            raise ConflictError(
                f"block {self.block.name!r} is already switched; "
                "call disable() on the engine that holds it, then enable again"
            )
        self._forward = SwitchedForward(module, module.__dict__.get(self._attribute), self._run)
        module.__dict__[self._attribute] = self._forward

    def undo(self) -> None:
        """Leave the block as it was before ``install``; a second call does nothing.

        If someone else replaced the attribute in the meantime, theirs stays; ours, should they call it, is transparent.
        """
        forward = self._forward
        if forward is None:
            return
        self._forward = None
        forward.retire()
        attributes = self.block.module.__dict__
        is_ours = attributes.get(self._attribute) is forward
        if not is_ours:
            return
        if forward.original is None:
            del attributes[self._attribute]
        else:
            attributes[self._attribute] = forward.original

    def _run(self, plain: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._plain_suffices and not frameworks.caches_exist():
            return self._dispatch(plain, args, kwargs)
        forward = partial(self._once, plain)
        if self._caches.present(args, kwargs) and self._dispatch.reruns and torch.is_grad_enabled():
            # As in transformers, only training does without a cache; what else has one is not recomputed.
            if not self.block.module.training or self._caches.filled(args, kwargs):
                return forward(*args, **kwargs)
            args, kwargs = self._caches.withheld(args, kwargs)
        return self._dispatch(forward, args, kwargs)

    def _once(self, plain: Call, /, *args: Any, **kwargs: Any) -> Any:
        with _native_checkpointing_off(self._native):
            if self.block.kind is BlockKind.CHECKPOINT_WRAPPER:
                return self.block.module.get_submodule("_checkpoint_wrapped_module")(*args, **kwargs)
            return plain(*args, **kwargs)


def _layer(module: nn.Module) -> nn.Module:
    """The module inside the wrappers that are part of a block."""
    for attribute in ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"):
        inner = module._modules.get(attribute)
        if inner is not None:
            return _layer(inner)
    return module


@contextmanager
def _native_checkpointing_off(layers: tuple[nn.Module, ...]) -> Iterator[None]:
    """Hold off transformers' own checkpointing of these layers: the dispatch decides."""
    switched_on = [layer for layer in layers if getattr(layer, "gradient_checkpointing", False)]
    saved = [layer.__dict__.get("gradient_checkpointing", _ABSENT) for layer in switched_on]
    for layer in switched_on:
        layer.__dict__["gradient_checkpointing"] = False
    try:
        yield
    finally:
        for layer, value in zip(switched_on, saved, strict=True):
            if value is _ABSENT:
                del layer.__dict__["gradient_checkpointing"]
            else:
                layer.__dict__["gradient_checkpointing"] = value
