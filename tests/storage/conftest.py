"""Fixtures of compiled blocks."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from gradckpt_dist.storage import variant


@pytest.fixture
def fresh_dynamo() -> None:
    torch._dynamo.reset()
    variant._Compilation._all.clear()
    counters.clear()
