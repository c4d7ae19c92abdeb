"""The peak of what a step allocates is predicted, with gradients on their way, and codes made while forward runs."""

from __future__ import annotations

import random

import pytest
import torch
from text_model import GPT
from torch.nn import functional

import gradckpt_dist
from gradckpt_dist.config import EXACT_STORAGES, LOSSY_STORAGES
from gradckpt_dist.cost.allocations import Allocations
from gradckpt_dist.policy import Evidence

LAYERS = 4
WITHIN = 0.01
"""Of the peak under keep."""


class _Training:
    """Weights stand still, as a mask is pinned for a step each."""

    def __init__(self, *, compiled: bool) -> None:
        torch.manual_seed(0)
        self._model = GPT(vocabulary=64, context=64, width=128, layers=LAYERS, heads=4, dropout=0.0)
        if compiled:
            for block in self._model.blocks:
                block.compile()
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.0)
        storages = [*EXACT_STORAGES, "offload", *LOSSY_STORAGES]
        config = {"interval": 4, "warmup_steps": 0, "storages": storages, "gradient_tolerance": 0.5}
        self.engine = gradckpt_dist.enable(self._model, config, optimizer=self._optimizer)
        self._tokens = torch.randint(64, (16, 64))

    def learn(self) -> Evidence:
        for _ in range(12):
            self._step()
        return self.engine._knowledge.evidence(self.engine.mask)

    def allocated_bytes(self, storages: list[str]) -> int:
        self.engine.set_mask(storages)
        self._step()
        with Allocations(torch.device("cpu"), enabled=True) as allocations:
            self._step()
        assert allocations.peak_bytes is not None
        return allocations.peak_bytes

    def _step(self) -> None:
        functional.cross_entropy(self._model(self._tokens), self._tokens.flatten()).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_the_allocated_peak_is_predicted_of_every_storage_and_of_random_masks(compiled: bool) -> None:
    training = _Training(compiled=compiled)
    costs = training.learn().costs
    assert costs is not None
    served = [name for name, serves in zip(costs.storages, costs.serves.all(axis=0), strict=True) if serves]
    assert {"keep", "recompute", "selective", "offload", *LOSSY_STORAGES} <= set(served)
    generator = random.Random(0)
    masks = [[name] * LAYERS for name in served]
    masks += [[generator.choice(served) for _ in range(LAYERS)] for _ in range(20)]
    allocated = [training.allocated_bytes(mask) for mask in masks]
    predicted = [costs.peak_bytes_of(costs.choice(mask)) for mask in masks]
    assert masks[0] == ["keep"] * LAYERS
    assert min(allocated) < 0.6 * allocated[0]
    for mask, found, expected in zip(masks, allocated, predicted, strict=True):
        error = (expected - predicted[0]) - (found - allocated[0])
        # One offloaded block alone fetches nothing ahead.
        assert -WITHIN * allocated[0] <= error, mask
        assert error <= WITHIN * allocated[0] or 0 < mask.count("offload") < LAYERS, mask
