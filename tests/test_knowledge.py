"""What is folded in at a decision, and what of it another run goes on with."""

from __future__ import annotations

import json
import math

from gradckpt_dist import Mask
from gradckpt_dist.knowledge import Knowledge
from gradckpt_dist.storage.ledger import Measurement

BLOCKS = ("a", "b")
MEASURED = Measurement(
    keep_bytes=(100, 200), recompute_bytes=(10, 20), stored_bytes=(100, 20), held_bytes=150, peak_bytes=350
)
SUMS = [1.0, 3.0, 2.0, 1.0]


def _mask(*storages: str) -> Mask:
    return Mask(blocks=BLOCKS, storages=storages)


def test_a_measurement_travels_and_is_folded_in() -> None:
    knowledge = Knowledge(2)
    maxima = knowledge.maxima(MEASURED, 0.25)
    assert maxima == [100.0, 200.0, 10.0, 20.0, 100.0, 20.0, 150.0, 350.0, 0.25]
    mask = _mask("keep", "recompute")
    knowledge.update(SUMS, maxima, mask)
    assert knowledge.stored_bytes == {"keep": (100, 200), "recompute": (10, 20)}
    assert (knowledge.held_bytes, knowledge.peak_bytes, knowledge.plugin_seconds) == (150, 350, 0.25)
    evidence = knowledge.evidence(mask)
    assert evidence.current is mask
    assert evidence.impacts == (math.sqrt(0.5), math.sqrt(1.5))
    assert evidence.bytes_of(mask.storages) == 120


def test_a_window_without_measurement_leaves_the_bytes() -> None:
    knowledge = Knowledge(2)
    nothing = knowledge.maxima(None, 0.5)
    assert nothing == [0.0] * 8 + [0.5]
    assert len(nothing) == len(knowledge.maxima(MEASURED, 0.5))
    mask = _mask("recompute", "recompute")
    knowledge.update(SUMS, nothing, mask)
    assert knowledge.evidence(mask).bytes_of(mask.storages) is None
    knowledge.update(SUMS, knowledge.maxima(MEASURED, 0.0), mask)
    knowledge.update(SUMS, nothing, mask)
    assert knowledge.stored_bytes == {"keep": (100, 200), "recompute": (10, 20)}
    assert (knowledge.held_bytes, knowledge.plugin_seconds) == (150, 0.5)


def test_other_storages_are_known_where_they_were_used() -> None:
    knowledge = Knowledge(2)
    stored = Measurement(
        keep_bytes=(100, 200), recompute_bytes=(10, 20), stored_bytes=(30, 20), held_bytes=50, peak_bytes=250
    )
    mask = _mask("offload", "recompute")
    knowledge.update(SUMS, knowledge.maxima(stored, 0.0), mask)
    assert knowledge.stored_bytes["offload"] == (30, 200)
    assert knowledge.evidence(mask).bytes_of(("offload", "offload")) == 230


def test_state_is_plain_and_restores_what_policies_read() -> None:
    knowledge, mask = Knowledge(2), _mask("keep", "recompute")
    knowledge.update(SUMS, knowledge.maxima(MEASURED, 0.25), mask)
    restored = Knowledge(2)
    restored.load_state_dict(json.loads(json.dumps(knowledge.state_dict())))
    assert restored.evidence(mask) == knowledge.evidence(mask)
    assert restored.state_dict() == knowledge.state_dict()
    for each in (knowledge, restored):
        each.update(SUMS, each.maxima(MEASURED, 0.25), mask)
    assert restored.running == knowledge.running
