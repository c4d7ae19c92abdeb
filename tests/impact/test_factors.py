"""Squared errors as products of what kinds, storages and blocks contribute."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from gradckpt_dist.impact.factors import ErrorFactors

STORAGES = ("compress8", "compress4")


def _probe(factors: ErrorFactors, *probes: tuple[int, int, float]) -> None:
    """A window with probes of a block under a storage that found this squared error."""
    blocks, storages, squares = (np.array(column) for column in zip(*probes, strict=True))
    factors.update(blocks, storages, squares[:, None])


def _of_blocks(factors: ErrorFactors) -> NDArray[np.float64]:
    return factors.of_blocks()[:, :, 0]


def test_products_are_found_from_probes_of_some_pairs() -> None:
    factors = ErrorFactors((0, 0, 0), STORAGES, fields=1)
    true = np.outer([1.0, 2.0, 0.5], [1e-4, 1e-2])
    for number in range(200):
        block = number % 3
        storage = 1 if block == 2 else number // 3 % 2
        _probe(factors, (block, storage, true[block, storage]))
    assert _of_blocks(factors) == pytest.approx(true, rel=0.1)
    assert factors.of_kinds()[0, :, 0] == pytest.approx(true.mean(axis=0), rel=0.1)
    assert not factors.probes[2, 0]


def test_what_is_common_to_a_kind_moves_all_its_blocks_and_no_other_kind() -> None:
    factors = ErrorFactors((0, 1, 0, 0), STORAGES, fields=1)
    for _ in range(10):
        _probe(factors, *((block, storage, 0.01) for block in range(4) for storage in range(2)))
    for _ in range(10):
        _probe(factors, (0, 0, 0.04), (2, 1, 0.04))
    errors = _of_blocks(factors)
    assert errors[1] == pytest.approx(0.01, rel=1e-6)
    assert (errors[3] > 0.02).all()
    assert (errors[[0, 2]] > errors[3]).all()


def test_a_block_that_was_not_probed_takes_the_largest_factor_of_its_kind() -> None:
    factors = ErrorFactors((0, 0, 0, 1), STORAGES, fields=1)
    for _ in range(50):
        _probe(factors, (0, 0, 0.1), (1, 0, 0.4))
    errors = _of_blocks(factors)
    assert errors[2, 0] == errors[1, 0] > errors[0, 0]
    assert np.isnan(errors[:, 1]).all()
    assert np.isnan(errors[3]).all()


def test_zeros_are_no_errors_and_leave_what_is_known_as_it_is() -> None:
    factors = ErrorFactors((0, 0), STORAGES, fields=1)
    _probe(factors, (0, 0, 0.0))
    assert _of_blocks(factors)[:, 0].tolist() == [0.0, 0.0]
    _probe(factors, (1, 0, 0.1))
    known = _of_blocks(factors)[1, 0]
    _probe(factors, (0, 0, 0.0))
    assert _of_blocks(factors)[1, 0] == known == pytest.approx(0.1)


def test_variance_falls_with_probes_and_grows_without() -> None:
    factors = ErrorFactors((0, 0), STORAGES, fields=1)
    at_first = factors.variances()
    for _ in range(10):
        _probe(factors, (0, 0, 0.1))
    probed = factors.variances()
    assert (probed[:, 0] < at_first[:, 0]).all()
    assert probed[0, 0] < probed[1, 0] < probed[1, 1]
    for _ in range(3):
        none = np.zeros(0, dtype=np.int64)
        factors.update(none, none, np.zeros((0, 1)))
    assert (factors.variances() >= probed).all()
    assert factors.variances()[0, 0] > probed[0, 0]


def test_ten_thousand_blocks_of_as_many_kinds() -> None:
    blocks = 10_000
    factors = ErrorFactors(range(blocks), STORAGES, fields=1)
    every = np.arange(blocks)
    squares = 1.0 + every
    factors.update(every, every % 2, squares[:, None])
    errors = _of_blocks(factors)
    assert errors[every, every % 2] == pytest.approx(squares)
    assert np.isnan(errors[every, 1 - every % 2]).all()
