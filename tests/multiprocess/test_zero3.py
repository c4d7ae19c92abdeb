"""Every storage under DeepSpeed's ZeRO-3, where parameters are gathered around each use."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from frameworks import assert_bitwise
from models import operations
from support import run_distributed_test
from text_model import GPT

import gradckpt_dist
from gradckpt_dist.mask import STORAGE_NAMES
from gradckpt_dist.storage import STORAGES

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def _train(storage: str | None) -> tuple[list[torch.Tensor], int]:
    """Losses and gradients of three steps, and the matrix products in the last one's backward."""
    import deepspeed

    torch.manual_seed(0)
    model = GPT(vocabulary=11, context=32, width=64, layers=3, heads=2, dropout=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG, dist_init_required=False)
    config = {"storages": list(STORAGES), "gradient_tolerance": 0.1, "interval": 2, "warmup_steps": 0}
    plugin = None if storage is None else gradckpt_dist.enable(engine, config)
    if plugin is not None:
        plugin.set_mask([storage] * 3)
    torch.manual_seed(dist.get_rank())
    record = []
    for _ in range(3):
        tokens = torch.randint(11, (4, 32))
        loss = engine(tokens).square().mean()
        with operations() as names:
            engine.backward(loss)
        record += [deepspeed.utils.safe_get_full_grad(parameter).clone() for parameter in model.parameters()]
        engine.step()
        record.append(loss.detach().clone())
    if plugin is not None:
        plugin.disable()
    engine.destroy()
    return record, sum(name.startswith(("aten.mm", "aten.addmm")) for name in names)


def _check_all_storages() -> None:
    os.environ |= {"LOCAL_RANK": str(dist.get_rank()), "DS_ACCELERATOR": "cpu"}
    reference, products = _train(None)
    done = {}
    for name in STORAGE_NAMES:
        if name not in STORAGES:
            continue
        ours, done[name] = _train(name)
        if STORAGES[name].exact:
            assert_bitwise(ours, reference)
        else:
            assert _relative_error(ours, reference) < 0.3
    assert done["keep"] == done["selective"] == done["selective8"] == done["selective4"] == products
    assert done["keep"] < done["selective_half"] < done["recompute"]


def _relative_error(ours: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    difference: Any = sum((one - other).square().sum() for one, other in zip(ours, reference, strict=True))
    total: Any = sum(other.square().sum() for other in reference)
    return float((difference / total).sqrt())


@pytest.mark.slow
def test_gradients_under_every_storage() -> None:
    run_distributed_test(_check_all_storages, 2, timeout_seconds=250)
