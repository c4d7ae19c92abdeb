"""Limits: what a plan may spend."""

from __future__ import annotations

import pytest

from gradckpt_dist.cost import Limits
from gradckpt_dist.errors import GradckptError


def test_a_plan_may_have_the_limit_less_the_reserve() -> None:
    assert Limits(peak_bytes=100).planned_bytes == 100
    assert Limits(peak_bytes=100, reserve_bytes=30).planned_bytes == 70
    assert Limits(peak_bytes=100, reserve_bytes=130).planned_bytes == -30


@pytest.mark.parametrize(
    "given",
    [{"peak_bytes": -1}, {"peak_bytes": 1, "squared_error": float("nan")}, {"peak_bytes": 1, "reserve_bytes": -1}],
)
def test_what_is_no_limit_is_refused(given: dict[str, float]) -> None:
    with pytest.raises(GradckptError, match="finite and not negative"):
        Limits(**given)  # type: ignore[arg-type]
