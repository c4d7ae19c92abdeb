"""Which adapter a model has. Nothing of a framework is imported that the script has not imported itself."""

from __future__ import annotations

import sys

from torch import nn

from gradckpt_dist.adapters.base import Adapter
from gradckpt_dist.adapters.deepspeed import DeepSpeedAdapter

ADAPTERS: tuple[Adapter, ...] = (DeepSpeedAdapter(),)
"""In the order in which they are asked."""


def adapter_of(model: nn.Module) -> Adapter:
    """The first adapter that recognises ``model``; else the base, for a model of no framework."""
    loaded = (adapter for adapter in ADAPTERS if adapter.framework is None or adapter.framework in sys.modules)
    return next((adapter for adapter in loaded if adapter.recognises(model)), Adapter())
