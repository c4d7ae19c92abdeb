"""What each storage of each block costs, and what may be spent."""

from __future__ import annotations

from gradckpt_dist.cost.limits import Limits
from gradckpt_dist.cost.table import CostTable

__all__ = ["CostTable", "Limits"]
