"""A sampled step gathers impact; a measured one counts bytes, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradckpt_dist.impact import Impact, create_impact
from gradckpt_dist.memory import memory_meter
from gradckpt_dist.peaks import StepPeaks
from gradckpt_dist.sampling import Sampler
from gradckpt_dist.storage import create_storage

ROWS, WIDTH = 4, 8
SAVED = ROWS * WIDTH * 4


@pytest.fixture
def impact() -> Impact:
    return create_impact("norm", 2, torch.device("cpu"))


def _sampler(impact: Impact) -> Sampler:
    return Sampler(impact, StepPeaks(memory_meter(torch.device("cpu"))))


def _step(sampler: Sampler) -> None:
    """Two blocks, y = tanh(x) and y = 3 y, of which the first holds its result and the second nothing."""
    sampler.begin_forward()
    y: Tensor = torch.zeros(ROWS, WIDTH, requires_grad=True)
    for index, forward in enumerate((torch.tanh, lambda x: 3 * x)):
        y = sampler(index, create_storage("keep", nn.Identity()), forward, (y,), {})
    sampler.end_forward()
    y.sum().backward()


def test_impact_only(impact: Impact) -> None:
    sampler = _sampler(impact)
    sampler.begin(measured=False)
    _step(sampler)
    assert sampler.end() is None
    first, second, count, dropped = impact.take_window().tolist()
    assert first / second == pytest.approx(9)
    assert (count, dropped) == (1, 0)


def test_bytes_of_a_measured_step(impact: Impact) -> None:
    sampler = _sampler(impact)
    sampler.begin(measured=True)
    _step(sampler)
    measured = sampler.end()
    assert measured is not None
    assert measured.keep_bytes == measured.stored_bytes == (SAVED, 0)
    assert measured.held_bytes == SAVED
    assert impact.take_window()[2] == 1
    sampler.begin(measured=False)
    _step(sampler)
    assert sampler.end() is None


def test_impact_is_gathered_where_bytes_cannot_be_counted(impact: Impact) -> None:
    sampler = _sampler(impact)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        sampler.begin(measured=True)
        _step(sampler)
        assert sampler.end() is None
    assert impact.take_window()[2] == 1
