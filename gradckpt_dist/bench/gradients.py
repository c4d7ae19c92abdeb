"""Comparing gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def relative_error(gradients: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """||gradients - reference|| / ||reference|| over all tensors together, in float64."""
    pairs = [(one.double(), other.double()) for one, other in zip(gradients, reference, strict=True)]
    difference = sum((one - other).square().sum().item() for one, other in pairs)
    return math.sqrt(difference / sum(other.square().sum().item() for _, other in pairs))
