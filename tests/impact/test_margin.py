"""What may be planned of a tolerance."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gradckpt_dist.impact.margin import DEVIATIONS, FIRST_SHARE, FIRST_VARIANCE, MOST, Margin


def _meet(margin: Margin, ratio: float, probes: int, variance: float = 1.0) -> None:
    expected = np.full(probes, 1e-4)
    margin.update(ratio * expected, expected, np.full(probes, variance))


def test_starts_with_little_and_ends_with_nearly_all_where_predictions_come_true() -> None:
    margin = Margin()
    assert margin.share(FIRST_VARIANCE) == pytest.approx(FIRST_SHARE)
    shares = [margin.share(1.0)]
    for _ in range(40):
        _meet(margin, 1.0, 1)
        shares.append(margin.share(1.0))
    assert shares == sorted(shares)
    assert shares[-1] == MOST


@pytest.mark.parametrize("ratio", [3.0, 1 / 3])
def test_leaves_room_for_errors_further_off_than_probes_use_to_be(ratio: float) -> None:
    margin = Margin()
    _meet(margin, ratio, 100)
    assert margin.share(1.0) ** 2 == pytest.approx(3.0**-DEVIATIONS, rel=1e-3)
    assert margin.share(4.0) ** 2 == pytest.approx(9.0**-DEVIATIONS, rel=1e-3)


def test_a_surprise_counts_by_how_well_it_should_have_been_known() -> None:
    expected_so, not_so = Margin(), Margin()
    _meet(expected_so, 3.0, 10, variance=9.0)
    _meet(not_so, 3.0, 10)
    assert expected_so.share(1.0) > not_so.share(1.0)


@pytest.mark.parametrize("value", [0.0, np.inf, np.nan])
def test_what_is_not_known_teaches_nothing(value: float) -> None:
    margin = Margin()
    before = margin.share(1.0)
    margin.update(np.array([value, 1.0]), np.array([1.0, value]), np.ones(2))
    assert margin.share(1.0) == before


def test_goes_on_from_its_state() -> None:
    margin, resumed = Margin(), Margin()
    _meet(margin, 2.0, 3)
    resumed.load_state_dict(json.loads(json.dumps(margin.state_dict())))
    assert resumed.share(1.0) == margin.share(1.0)
    for each in (margin, resumed):
        _meet(each, 1.0, 1)
    assert resumed.share(1.0) == margin.share(1.0)
