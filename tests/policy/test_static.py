"""``static``: the same mask, whatever is seen."""

from __future__ import annotations

from typing import Any

import pytest

from gradckpt_dist import Config, Mask
from gradckpt_dist.policy import Evidence, create_policy

R, K = "recompute", "keep"


@pytest.mark.parametrize(
    ("every_n", "expected"),
    [
        ("none", (K, K, K, K, K)),
        (0, (K, K, K, K, K)),
        ("full", (R, R, R, R, R)),
        (1, (R, R, R, R, R)),
        (2, (R, K, R, K, R)),
        (3, (R, K, K, R, K)),
        (9, (R, K, K, K, K)),
    ],
)
def test_every_n(every_n: Any, expected: tuple[str, ...]) -> None:
    policy = create_policy(Config(policy="static", every_n=every_n))
    assert policy.initial(5) == expected
    for impacts in ((), (5.0, 1.0, 2.0, 3.0, 4.0)):
        current = Mask(blocks=tuple("abcde"), storages=(R, R, K, K, K))
        plan = policy.plan(Evidence(current=current, impacts=impacts, stored_bytes={}))
        assert plan.storages == expected
        assert plan.theta is None
