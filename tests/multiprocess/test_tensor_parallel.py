"""Tensor and sequence parallelism, alone on two ranks and beside FSDP2 on four: gradients, statistics, bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from frameworks import assert_bitwise, local
from meshes import (
    BATCH,
    DEPTH,
    PLANS,
    TOKENS,
    WIDTH,
    batches,
    loss_of,
    replica_of,
    train,
    transformer,
    two_dimensional,
)
from support import run_distributed_test
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import gradckpt_dist
from gradckpt_dist.blocks import find_blocks
from gradckpt_dist.impact.norm import square
from gradckpt_dist.impact.weights import GradientWeights
from gradckpt_dist.storage import STORAGES, create_storage
from gradckpt_dist.storage.ledger import Ledger

STEPS = 3
TOLERANCES = {"compress8": 0.02, "selective8": 0.02, "compress4": 0.2, "selective4": 0.2}
CPU = torch.device("cpu")


def _settings(*storages: str, **more: Any) -> dict[str, Any]:
    return {"storages": list(dict.fromkeys(("keep", "recompute", *storages))), "interval": 1000, **more}


def _check_storages(make: Callable[[], nn.Module], replica: int) -> None:
    """Every exact storage is bitwise that of the model without the plugin."""
    plain = train(make(), STEPS, replica)
    for name, storage in STORAGES.items():
        if storage.exact:
            model = make()
            engine = gradckpt_dist.enable(model, _settings(name))
            engine.set_mask([name] * DEPTH)
            ours = train(model, STEPS, replica)
            try:
                assert_bitwise(ours, plain)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
            engine.disable()


def _check_moving_mask(make: Callable[[], nn.Module], replica: int) -> None:
    plain = train(make(), 20, replica)
    model = make()
    engine = gradckpt_dist.enable(model, {"interval": 4, "warmup_steps": 0, "memory_budget": 0.5})
    assert_bitwise(train(model, 20, replica), plain)
    assert engine.mask.epoch >= 3
    assert len(set(engine.mask.storages)) > 1
    engine.disable()


def _gradients(model: nn.Module, replica: int) -> list[torch.Tensor]:
    tokens = batches(1, replica)[0]
    model.zero_grad()
    loss_of(model(tokens[:, :-1]), tokens[:, 1:]).backward()
    return [local(p.grad).clone() for p in model.parameters() if p.grad is not None]


def _relative_error(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    squares = torch.tensor(
        [
            sum((one - other).double().square().sum().item() for one, other in zip(ours, exact, strict=True)),
            sum(other.double().square().sum().item() for other in exact),
        ]
    )
    dist.all_reduce(squares)
    return float((squares[0] / squares[1]).sqrt())


def _check_tolerance(make: Callable[[], nn.Module], replica: int, names: Iterable[str]) -> None:
    """Whatever lossy storage blocks of low impact have, the gradient keeps to the tolerance."""
    for name in names:
        tolerance = TOLERANCES[name]
        model = make()
        settings = _settings(name, policy="threshold", threshold={"low_impact_storage": name}, memory_budget=0.9)
        engine = gradckpt_dist.enable(
            model, settings | {"interval": 4, "warmup_steps": 0, "gradient_tolerance": tolerance}
        )
        train(model, 16, replica)
        assert name in engine.mask.storages, (name, engine.stats())
        torch.manual_seed(0)
        found = _gradients(model, replica)
        engine.set_mask(["keep"] * DEPTH)
        torch.manual_seed(0)
        assert 0 < _relative_error(found, _gradients(model, replica)) <= tolerance
        engine.disable()


def _block_bytes(plan: str, storage: str, mesh: DeviceMesh) -> int:
    """What a block holds, by the ledger."""
    block = transformer(plan, mesh).blocks[0]
    x = torch.randn(BATCH, TOKENS if plan == "tensor" else TOKENS // 2, WIDTH, requires_grad=True)
    given = DTensor.from_local(x, mesh, [Shard(1)]) if plan == "distributed outputs" else x
    ledger = Ledger(1)
    ledger.begin_forward()
    output = ledger.run(0, create_storage(storage, block), block, (given,), {})
    ledger.end_forward()
    output.sum().backward()
    return ledger.measurement().stored_bytes[0]


def _check_bytes(mesh: DeviceMesh) -> None:
    """This rank's part of DTensors counts, and is compressed and moved like other tensors."""
    held = {(plan, storage): _block_bytes(plan, storage, mesh) for plan in PLANS for storage in STORAGES}
    for plan in PLANS:
        whole = held[plan, "keep"]
        # What q, k, v and the MLP multiply; halves of q, k, v, of what attention mixes, of the hidden layer twice.
        assert whole >= BATCH * TOKENS * WIDTH * 4 * (2 + 4 / 2 + 2 * 4 / 2)
        assert held[plan, "compress8"] < 0.35 * whole
        assert held[plan, "compress4"] < held[plan, "compress8"]
        assert held[plan, "offload"] < 0.05 * whole
        assert held[plan, "recompute"] < held[plan, "selective8"] < held[plan, "selective"] < whole
    assert held["sequence", "keep"] == held["distributed outputs", "keep"]


def _check_shares_of_distributed_tensors() -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    expected = whole.double().square().sum()
    cells = torch.zeros(3, dtype=torch.float64)
    for cell, placement in zip(cells, (Shard(0), Shard(1), Replicate()), strict=True):
        cell.add_(square(DTensor.from_local(whole, mesh, [Replicate()]).redistribute(placements=[placement]), cells))
    dist.all_reduce(cells)
    torch.testing.assert_close(cells, expected.expand(3), rtol=1e-6, atol=0)
    half = DTensor.from_local(whole * (0.25 if dist.get_rank() else 0.75), mesh, [Partial()])
    total = square(half, cells)
    dist.all_reduce(total)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)


def _shares(model: nn.Module) -> torch.Tensor:
    weights = GradientWeights(model, [block.module for block in find_blocks(model)], CPU)
    _gradients(model, 0)
    weights.gather(torch.tensor(1.0))
    window = weights.take_window()
    dist.all_reduce(window)
    return window[:-1] / window[:-1].sum()


def _impacts(make: Callable[[], nn.Module], metric: str) -> torch.Tensor:
    model = make()
    settings = _settings("compress8", gradient_tolerance=0.5, impact=metric, interval=4, warmup_steps=0)
    engine = gradckpt_dist.enable(model, settings)
    train(model, 8, learning_rate=0.0)
    impacts = torch.tensor(engine.stats()["impacts"])
    engine.disable()
    return impacts


def _check_statistics() -> None:
    """Of a model that is shared out as of one that is whole, on two ranks with the same data."""
    _check_shares_of_distributed_tensors()
    mesh = init_device_mesh("cpu", (2,))
    shares, impacts = _shares(transformer(None)), _impacts(lambda: transformer(None), "norm")
    assert impacts.max() / impacts.min() > 1.01
    for plan in PLANS:
        torch.testing.assert_close(_shares(transformer(plan, mesh)), shares, rtol=1e-3, atol=1e-6, msg=plan)
        for metric in ("norm", "influence"):
            found = _impacts(lambda plan=plan: transformer(plan, mesh), metric)
            torch.testing.assert_close(found, impacts, rtol=0.01, atol=0, msg=f"{plan}, {metric}")


def _check_statistics_and_bytes() -> None:
    _check_statistics()
    _check_bytes(init_device_mesh("cpu", (2,)))


def _check_two_ranks(plan: str) -> None:
    mesh = init_device_mesh("cpu", (2,))

    def make() -> nn.Module:
        return transformer(plan, mesh, dropout=0.1 if plan == "tensor" else 0.0)

    _check_storages(make, 0)
    _check_moving_mask(make, 0)
    _check_tolerance(make, 0, TOLERANCES)


def _check_four_ranks() -> None:
    for plan in ("tensor", "distributed outputs"):

        def make(plan: str = plan) -> nn.Module:
            return two_dimensional(plan)

        engine = gradckpt_dist.enable(make(), _settings())
        assert engine._agreement.ranks == 4
        engine.disable()
        try:
            _check_storages(make, replica_of())
            _check_moving_mask(make, replica_of())
            _check_tolerance(make, replica_of(), ("compress8", "selective4"))
        except AssertionError as error:
            raise AssertionError(f"{plan}: {error}") from error


@pytest.mark.slow
def test_statistics_and_bytes_of_every_plan_on_two_ranks() -> None:
    run_distributed_test(_check_statistics_and_bytes, 2, timeout_seconds=250)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_gradients_on_two_ranks(plan: str) -> None:
    run_distributed_test(_check_two_ranks, 2, plan, timeout_seconds=280)


@pytest.mark.slow
def test_beside_fsdp2_on_four_ranks() -> None:
    run_distributed_test(_check_four_ranks, 4, timeout_seconds=280)
