"""Masks: values that all ranks compare."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradckpt_dist import Mask, MaskError
from gradckpt_dist.mask import STORAGE_NAMES

STORAGES = st.lists(st.sampled_from(STORAGE_NAMES), min_size=1, max_size=40)


def _mask(storages: list[str], epoch: int = 0) -> Mask:
    return Mask(blocks=tuple(f"layers.{i}" for i in range(len(storages))), storages=tuple(storages), epoch=epoch)


@given(STORAGES, st.integers(0, 2**62))
def test_round_trips_through_codes(storages: list[str], epoch: int) -> None:
    mask = _mask(storages, epoch)
    codes = mask.to_codes()
    assert len(codes) == len(storages)
    assert Mask.from_codes(codes, mask.blocks, epoch) == mask


@given(STORAGES, STORAGES)
def test_digest_is_of_names_and_storages_alone(one: list[str], other: list[str]) -> None:
    assert (_mask(one).digest == _mask(other).digest) == (one == other)
    assert _mask(one, 0).digest == _mask(one, 7).digest
    renamed = Mask(blocks=tuple(f"h.{i}" for i in range(len(one))), storages=tuple(one))
    assert renamed.digest != _mask(one).digest


def test_digest_and_codes_do_not_change_between_versions() -> None:
    assert _mask(["keep", "recompute"]).digest == "591a710af8a700a7"
    assert _mask(list(STORAGE_NAMES)).to_codes() == bytes(range(12))
    assert STORAGE_NAMES[:2] == ("keep", "recompute")


def test_replaced_is_one_epoch_on() -> None:
    mask = _mask(["keep", "recompute"], epoch=3)
    assert mask.replaced(["keep", "keep"]) == _mask(["keep", "keep"], epoch=4)
    assert mask.indices("recompute") == (1,)
    assert len(mask) == 2
    with pytest.raises(MaskError, match="1 storages for 2 blocks"):
        mask.replaced(["keep"])
    with pytest.raises(MaskError, match=r"unknown storage 'zip' for block 'layers\.1'; allowed: keep, recompute"):
        mask.replaced(["keep", "zip"])


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (bytes(3), "a mask of 2 blocks has 2 codes, not 3"),
        (b"", "a mask of 2 blocks has 2 codes, not 0"),
        (bytes([0, 12]), r"storage code 12 is not in 0\.\.11"),
        (bytes([255, 0]), r"storage code 255 is not in 0\.\.11"),
    ],
)
def test_from_codes_refuses(codes: bytes, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        Mask.from_codes(codes, ("a", "b"), 0)


def test_long_lists_of_blocks_are_abridged() -> None:
    with pytest.raises(MaskError, match=r"b5, … \(100 in all\)$"):
        Mask(blocks=tuple(f"b{i}" for i in range(100)), storages=())
