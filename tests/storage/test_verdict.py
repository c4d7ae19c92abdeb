"""Outcomes of a block and of its variant, compared."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gradckpt_dist.storage.verdict import Outcome

NAN = math.nan


def _outcome(*values: Tensor | None, state: float = 1.0) -> Outcome:
    return Outcome(values=values, states=(torch.tensor(state),))


def test_equal_is_bit_for_bit_with_nan_and_none() -> None:
    ours = _outcome(torch.tensor([1.0, NAN]), None)
    assert ours.equals(_outcome(torch.tensor([1.0, NAN]), None))
    others = (
        _outcome(torch.tensor([1.0, 2.0]), None),
        _outcome(torch.tensor([1.0, NAN]), torch.ones(1)),
        _outcome(torch.tensor([1.0, NAN])),
        _outcome(torch.tensor([1.0, NAN], dtype=torch.float64), None),
        _outcome(torch.tensor([1.0, NAN]), None, state=2.0),
    )
    assert not any(ours.equals(other) for other in others)


def test_the_error_is_of_all_values_together() -> None:
    exact = _outcome(torch.tensor([3.0]), None, torch.tensor([4.0]))
    assert _outcome(torch.tensor([3.0]), None, torch.tensor([4.5])).relative_error(exact) == pytest.approx(0.1)
    assert exact.relative_error(exact) == 0.0


@pytest.mark.parametrize(
    "ours",
    [
        _outcome(torch.ones(2), state=2.0),
        _outcome(None),
        _outcome(torch.ones(2), None),
        _outcome(torch.tensor([1.0, math.inf])),
        _outcome(torch.tensor([1.0, NAN])),
    ],
)
def test_what_cannot_be_compared_is_below_no_limit(ours: Outcome) -> None:
    assert not ours.relative_error(_outcome(torch.ones(2))) <= 1e30
