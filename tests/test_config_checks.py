"""The checks of single values, where the configuration's own tests do not reach them."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradckpt_dist import config_checks as check


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1KiB", 1024),
        ("40GiB", 40 * 2**30),
        ("1.5 MiB", 3 * 2**19),
        (" 2TiB ", 2**41),
    ],
)
def test_byte_count(text: str, size_bytes: int) -> None:
    assert check.byte_count(text) == size_bytes


@pytest.mark.parametrize("text", ["40Gib", "40gib", "40GB", "40", "GiB", "0GiB", "-1GiB", "1e3GiB", "1,5GiB", "", 40])
def test_byte_count_refuses(text: Any) -> None:
    with pytest.raises(check.CheckError, match="KiB, MiB, GiB, TiB"):
        check.byte_count(text)


def test_open_and_closed_ends() -> None:
    closed, opened = check.number(0, 1), check.number(0, 1, low_open=True, high_open=True)
    assert (closed(0), closed(1), opened(0.5)) == (0.0, 1.0, 0.5)
    for end in (0, 1):
        with pytest.raises(check.CheckError, match="a number of more than 0 and less than 1"):
            opened(end)
    with pytest.raises(check.CheckError, match="a number of at least 0 and at most 1"):
        closed(2)


def test_alternatives_name_both() -> None:
    either = check.either(check.integer(2), check.one_of("a", "b"))
    assert (either(2), either("b")) == (2, "b")
    with pytest.raises(check.CheckError, match="a whole number of at least 2, or 'a' or 'b'"):
        either(1)


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())))
def test_a_check_returns_the_value_or_refuses_it(value: Any) -> None:
    checks = [
        check.boolean,
        check.integer(0),
        check.number(0, 1),
        check.number(float("-inf")),
        check.text,
        check.none,
        check.byte_count,
        check.list_of(check.integer(0), what="numbers"),
        check.optional(check.one_of("a")),
    ]
    for checked in checks:
        with contextlib.suppress(check.CheckError):
            result = checked(value)
            # A number is normalised to a float, which whole numbers beyond 2**53 round to.
            assert result == value or checked is check.byte_count or isinstance(value, list) or result == float(value)
