"""Impact metrics by name."""

from __future__ import annotations

import torch

from gradckpt_dist.impact.base import Impact, RunningImpact
from gradckpt_dist.impact.influence import InfluenceImpact
from gradckpt_dist.impact.norm import NormImpact
from gradckpt_dist.impact.probe import ProbeImpact

IMPACTS: dict[str, type[Impact]] = {impact.name: impact for impact in (NormImpact, InfluenceImpact, ProbeImpact)}


def create_impact(name: str, blocks: int, device: torch.device) -> Impact:
    """The metric of that name; ``Config.impact`` has checked the name."""
    return IMPACTS[name](blocks, device)


__all__ = ["IMPACTS", "Impact", "RunningImpact", "create_impact"]
