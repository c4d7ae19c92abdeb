"""Checks of a configuration's fields: each takes a value and returns it normalised, or says what is allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

Check = Callable[[Any], Any]

_BINARY_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
BYTES_FORM = f"bytes as a text with one of the units {', '.join(_BINARY_UNITS)}, such as '40GiB'"
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


class CheckError(ValueError):
    """The message says what is allowed; the caller adds the field and the value that was given."""


def boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise CheckError("true or false")
    return value


def integer(low: int) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise CheckError(f"a whole number of at least {low}")
        return value

    return check


def number(low: float, high: float = math.inf, *, low_open: bool = False, high_open: bool = False) -> Check:
    """A finite number in the interval from ``low`` to ``high``; either end may be excluded."""
    bounds = f"more than {low:g}" if low_open else f"at least {low:g}"
    if high < math.inf:
        bounds += f" and {'less than' if high_open else 'at most'} {high:g}"
    allowed = "a finite number" if math.isinf(low) and math.isinf(high) else f"a number of {bounds}"

    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckError(allowed)
        try:
            real = float(value)
        except OverflowError:
            raise CheckError(allowed) from None
        below = real <= low if low_open else real < low
        above = real >= high if high_open else real > high
        if below or above or not math.isfinite(real):
            raise CheckError(allowed)
        return real

    return check


def one_of(*choices: str) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise CheckError(" or ".join(repr(choice) for choice in choices))
        return value

    return check


def either(first: Check, second: Check) -> Check:
    """``first``, or else ``second``; a failure names what both allow."""

    def check(value: Any) -> Any:
        try:
            return first(value)
        except CheckError as one:
            try:
                return second(value)
            except CheckError as other:
                raise CheckError(f"{one}, or {other}") from None

    return check


def optional(inner: Check) -> Check:
    return either(inner, none)


def none(value: Any) -> None:
    if value is not None:
        raise CheckError("nothing (null)")


def text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise CheckError("a non-empty text")
    return value


def list_of(inner: Check, *, what: str) -> Check:
    def check(value: Any) -> tuple[Any, ...]:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise CheckError(f"a list of {what}")
        try:
            return tuple(inner(item) for item in value)
        except CheckError as failure:
            raise CheckError(f"a list of {what}, each {failure}") from None

    return check


def byte_count(value: Any) -> int:
    """Bytes from a text such as ``"40GiB"`` (units KiB, MiB, GiB, TiB; binary only, as GB is read both ways)."""
    match = _BYTES.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or match[2] not in _BINARY_UNITS or float(match[1]) <= 0:
        raise CheckError(BYTES_FORM)
    return int(float(match[1]) * _BINARY_UNITS[match[2]])
