"""Which adapter a model has. Nothing of a framework is imported that the script has not imported itself."""

from __future__ import annotations

import sys

from torch import nn

from gradckpt_dist.adapters.accelerate import AccelerateAdapter
from gradckpt_dist.adapters.base import Adapter
from gradckpt_dist.adapters.deepspeed import DeepSpeedAdapter
from gradckpt_dist.adapters.versions import warn_if_untested

ADAPTERS: tuple[Adapter, ...] = (DeepSpeedAdapter(), AccelerateAdapter())
"""In the order in which they are asked; Accelerate after those whose engines it only passes on."""


def adapter_of(model: nn.Module) -> Adapter:
    """The first adapter that recognises ``model``; else the base, for a model of no framework."""
    loaded = (adapter for adapter in ADAPTERS if adapter.framework is None or adapter.framework in sys.modules)
    chosen = next((adapter for adapter in loaded if adapter.recognises(model)), Adapter())
    if chosen.framework is not None:
        warn_if_untested(chosen.framework)
    return chosen
