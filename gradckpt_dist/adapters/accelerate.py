"""Accelerate: a model that ``Accelerator.prepare`` returned is saved with the plugin's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from gradckpt_dist.adapters.accelerate_checkpoint import save_with
from gradckpt_dist.adapters.base import Adapter
from gradckpt_dist.engine import Engine
from gradckpt_dist.live_objects import live_objects

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["AccelerateAdapter", "save_with"]


class AccelerateAdapter(Adapter):
    """A model that ``Accelerator.prepare`` returned, whatever it was wrapped in."""

    framework = "accelerate"

    def recognises(self, model: nn.Module) -> bool:
        return getattr(model, "_is_accelerate_prepared", False) is True

    def attach(self, engine: Engine, model: nn.Module) -> Callable[[], None]:
        undo = [save_with(accelerator, engine) for accelerator in _accelerators_of(model)]

        def detach() -> None:
            for remove in undo:
                remove()

        return detach


def _accelerators_of(model: nn.Module) -> list[Accelerator]:
    """Those that prepared this model, which neither knows them nor is, as DDP, what they know: that is inside it.

    Accelerate itself keeps no list of them.
    """
    from accelerate import Accelerator  # noqa: PLC0415

    parts = set(model.modules())
    return [one for one in live_objects(Accelerator) if not parts.isdisjoint(one._models)]
