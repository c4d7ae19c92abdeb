"""Eight transformers architectures: every block found, and bitwise gradients under random masks of exact storages."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, BLOCKS, build, loss_of
from frameworks import assert_bitwise
from support import run_distributed_test
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradckpt_dist
from gradckpt_dist.storage import STORAGES

pytest.importorskip("transformers")

EXACT = tuple(name for name, storage in STORAGES.items() if storage.exact)
MASKS = 6
STEPS = 2


def _train(model: nn.Module, loss: Any) -> list[Tensor]:
    """Losses and gradients of a few steps, and the random state that they leave."""
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    record = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        record += [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    return [*record, torch.get_rng_state()]


def _check(architecture: str, use_cache: bool, ranks: int) -> None:
    options = {} if architecture.startswith(("ViT", "Bert")) else {"use_cache": use_cache}
    loss = loss_of(architecture, **options)

    def wrapped() -> nn.Module:
        model = build(architecture)
        return model if ranks == 1 else DistributedDataParallel(model, find_unused_parameters=True)

    plain = _train(wrapped(), loss)
    model = wrapped()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = {"storages": list(EXACT), "policy": "static", "warmup_steps": 1000}
    engine = gradckpt_dist.enable(model, config)
    assert list(engine.mask.blocks) == BLOCKS[architecture]
    assert list(model.state_dict()) == list(start)
    chosen = random.Random(architecture)
    used: set[str] = set()
    for _ in range(MASKS):
        storages = [chosen.choice(EXACT) for _ in BLOCKS[architecture]]
        engine.set_mask(storages)
        model.load_state_dict(start)
        before = engine.stats()["recomputes"]
        try:
            assert_bitwise(_train(model, loss), plain)
        except AssertionError as error:
            raise AssertionError(f"{architecture} under {storages}: {error}") from error
        done = [after - earlier for after, earlier in zip(engine.stats()["recomputes"], before, strict=True)]
        assert done == [STEPS * (storage == "recompute") for storage in storages]
        used |= set(storages)
    assert used == set(EXACT)
    engine.disable()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_mask_is_bitwise(architecture: str) -> None:
    _check(architecture, use_cache=True, ranks=1)


def _check_all() -> None:
    for architecture in ARCHITECTURES:
        _check(architecture, use_cache=False, ranks=2)


@pytest.mark.slow
def test_any_mask_is_bitwise_on_two_ranks() -> None:
    run_distributed_test(_check_all, 2, timeout_seconds=280)
