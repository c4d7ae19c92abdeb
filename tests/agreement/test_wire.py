"""The decision on the wire: nothing that changed on the way is taken for a decision."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradckpt_dist import Mask, MaskError
from gradckpt_dist.agreement.wire import Decision, decode, encode, message_bytes
from gradckpt_dist.mask import STORAGE_NAMES

BLOCKS = ("layers.0", "layers.1", "layers.2")


def _decision(storages: list[str], epoch: int = 3, step: int = 54, theta: float = 0.75) -> Decision:
    blocks = tuple(f"layers.{i}" for i in range(len(storages)))
    return Decision(mask=Mask(blocks=blocks, storages=tuple(storages), epoch=epoch), step=step, theta=theta)


@given(
    st.lists(st.sampled_from(STORAGE_NAMES), min_size=1, max_size=64),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**63 - 1),
    st.floats(),
)
def test_round_trip(storages: list[str], epoch: int, step: int, theta: float) -> None:
    sent = _decision(storages, epoch, step, theta)
    message = encode(sent)
    assert (message.dtype, message.shape) == (torch.uint8, (message_bytes(len(storages)),))
    received = decode(message, sent.mask.blocks)
    assert (received.mask, received.step) == (sent.mask, step)
    assert received.theta == theta or (math.isnan(received.theta) and math.isnan(theta))


@pytest.mark.parametrize("position", range(message_bytes(len(BLOCKS))))
def test_every_change_of_any_byte_is_found(position: int) -> None:
    message = encode(_decision(["keep", "recompute", "keep"]))
    for change in range(1, 256):
        changed = message.clone()
        changed[position] ^= change
        with pytest.raises(MaskError):
            decode(changed, BLOCKS)


@pytest.mark.parametrize("length", [0, 1, message_bytes(2), message_bytes(3) - 1, message_bytes(3) + 1])
def test_wrong_length_is_refused(length: int) -> None:
    message = torch.zeros(length, dtype=torch.uint8)
    whole = encode(_decision(["keep", "recompute", "keep"]))
    message[: min(length, len(whole))] = whole[:length]
    with pytest.raises(MaskError, match=f"a decision for 3 blocks has {message_bytes(3)} bytes, not {length}"):
        decode(message, BLOCKS)


def test_decision_on_other_blocks_is_refused() -> None:
    message = encode(_decision(["keep", "recompute", "keep"]))
    with pytest.raises(MaskError, match="does not match its digest"):
        decode(message, ("layers.0", "layers.1", "layers.3"))


def test_a_storage_that_this_version_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mask, "to_codes", lambda _: bytes([0, len(STORAGE_NAMES), 0]))
    message = encode(_decision(["keep", "recompute", "keep"]))  # whole, and from a later version
    with pytest.raises(MaskError, match=rf"storage code {len(STORAGE_NAMES)} is not in 0\.\.{len(STORAGE_NAMES) - 1}"):
        decode(message, BLOCKS)


def test_zeros_are_no_decision() -> None:
    with pytest.raises(MaskError):
        decode(torch.zeros(message_bytes(3), dtype=torch.uint8), BLOCKS)
