"""Training with a probe in every step is bitwise that without, on every framework."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from frameworks import FRAMEWORKS, Model, assert_bitwise, local, without_sync, wrap
from probing_support import CPU, Probed, coarse_storage
from support import run_distributed_test
from text_model import GPT
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from gradckpt_dist.blocks import find_blocks
from gradckpt_dist.cost.kind import kinds_of
from gradckpt_dist.impact.weights import GradientWeights

STORAGES = ("keep", "recompute", "selective", "selective_half", "compress8", "compress4", "selective8", "offload")


def _train(framework: str, *, probed: bool, storage: str, autocast: bool, accumulate: int) -> list[torch.Tensor]:
    torch.manual_seed(7)
    model = wrap(Model(), framework)
    rank = dist.get_rank() if dist.is_initialized() else 0
    probe = Probed(model, STORAGES, ["compress4"])
    probe.use(storage)
    torch.manual_seed(100 + rank)
    data = torch.Generator().manual_seed(rank)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
    record: list[torch.Tensor] = []
    for step in range(7):
        optimizer.zero_grad()
        if probed:
            probe.begin(step % 6, measured=step % 2 == 0)
        for left in reversed(range(accumulate)):
            batch = torch.randn(8, 32, generator=data)
            if left:
                with without_sync(model):
                    record.append(_backward(model, batch, autocast))
            else:
                record.append(_backward(model, batch, autocast))
        record += [local(p.grad).clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        if probed:
            probe.end()
        record.append(torch.get_rng_state())
    if probed:
        _check_learnt(probe)
        assert [runtime.recomputes > 0 for runtime in probe.runtimes] == [storage == "recompute"] * 6
    probe.undo()
    return record


def _backward(model: torch.nn.Module, batch: torch.Tensor, autocast: bool) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(batch).float().square().mean()
    loss.backward()
    return loss.detach()


def _check_learnt(probe: Probed, probes: int = 7) -> None:
    assert probe.prober.probes == probes
    values = probe.agree()
    for block in range(6):
        for name in STORAGES:
            cost = probe.costs.of(block, name)
            assert cost.seconds is not None
            assert cost.held_bytes is not None
            assert cost.seconds > 0
        assert probe.costs.held_bytes(block, "recompute") < probe.costs.held_bytes(block, "keep")
    errors = probe.expected.squared("probe", values)[:, 0]
    assert ((errors > 0) & (errors < 0.01)).all(), errors


def _check(framework: str) -> None:
    with coarse_storage():
        for storage, autocast, accumulate in (("keep", False, 1), ("recompute", True, 1), ("recompute", False, 2)):
            arguments: Any = {"storage": storage, "autocast": autocast, "accumulate": accumulate}
            assert_bitwise(_train(framework, probed=True, **arguments), _train(framework, probed=False, **arguments))


def _check_shares_of_sharded_gradients() -> None:
    shares = {}
    for framework in ("ddp", "fsdp1", "fsdp1_flat", "fsdp2"):
        torch.manual_seed(0)
        model = wrap(Model().eval(), framework)
        weights = GradientWeights(model, [block.module for block in find_blocks(model)], CPU)
        model(torch.linspace(-1, 1, 256).view(8, 32)).square().mean().backward()
        weights.gather(torch.tensor(1.0))
        window = weights.take_window()
        torch.distributed.all_reduce(window)
        before, *blocks, after = (window[:-1] / window[:-1].sum()).tolist()
        assert (before == 0) != (framework == "fsdp1_flat")
        shares[framework] = torch.tensor([*blocks, before + after])
    assert shares["ddp"][0] > 0.01
    for framework, share in shares.items():
        torch.testing.assert_close(share, shares["ddp"], rtol=1e-3, atol=1e-6, msg=framework)


def _check_kinds_of_sharded_blocks() -> None:
    for framework in ("fsdp1", "fsdp1_flat", "fsdp2"):
        kinds = kinds_of([block.module for block in find_blocks(wrap(Model(), framework))])
        assert kinds[0] == kinds[2] == kinds[5] == 0, (framework, kinds)


def _train_tensor_parallel(*, probed: bool) -> list[torch.Tensor]:
    torch.manual_seed(7)
    model = Model()
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    probe = Probed(model, STORAGES, ["compress4"])
    torch.manual_seed(100)
    data = torch.Generator().manual_seed(1)
    record: list[torch.Tensor] = []
    for step in range(6):
        model.zero_grad()
        if probed:
            probe.begin(step)
        record.append(_backward(model, torch.randn(8, 32, generator=data), False))
        record += [local(p.grad).clone() for p in model.parameters() if p.grad is not None]
        if probed:
            probe.end()
    if probed:
        _check_learnt(probe, probes=6)
    probe.undo()
    return record


def _check_frameworks() -> None:
    with coarse_storage():
        assert_bitwise(_train_tensor_parallel(probed=True), _train_tensor_parallel(probed=False))
    _check_kinds_of_sharded_blocks()
    _check_shares_of_sharded_gradients()
    for framework in FRAMEWORKS[1:]:
        try:
            _check(framework)
        except AssertionError as error:
            raise AssertionError(f"{framework}: {error}") from error


def test_leaves_no_trace_in_a_single_process() -> None:
    _check("single")


def test_on_two_ranks_under_tensor_parallelism_ddp_fsdp1_and_fsdp2() -> None:
    run_distributed_test(_check_frameworks, 2)


ZERO3 = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


ZERO3_STORAGES = ("keep", "recompute", "selective", "compress4", "offload")


def _train_zero3(*, probed: bool, storage: str) -> list[torch.Tensor]:
    import deepspeed

    torch.manual_seed(0)
    model = GPT(vocabulary=11, context=32, width=64, layers=2, heads=2, dropout=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ZERO3, dist_init_required=False)
    probe = Probed(engine, ZERO3_STORAGES, ["compress4"])
    probe.use(storage)
    torch.manual_seed(dist.get_rank())
    record = []
    for step in range(3):
        tokens = torch.randint(11, (4, 32))
        if probed:
            probe.begin(step % 2)
        loss = engine(tokens).square().mean()
        engine.backward(loss)
        record += [deepspeed.utils.safe_get_full_grad(parameter).clone() for parameter in model.parameters()]
        engine.step()
        record += [loss.detach().clone(), torch.get_rng_state()]
        if probed:
            probe.end()
    if probed:
        assert probe.prober.probes == 3
        errors = probe.expected
        values = probe.agree()
        squared = errors.squared("probe", values)[:, 0]
        assert ((squared > 0) & (squared < 0.01)).all(), squared
        assert (errors.squared("norm", values) > 0).all(), errors.squared("norm", values)
    probe.undo()
    engine.destroy()
    return record


def _check_zero3() -> None:
    os.environ |= {"LOCAL_RANK": str(dist.get_rank()), "DS_ACCELERATOR": "cpu"}
    with coarse_storage():
        for storage in ("keep", "recompute"):
            assert_bitwise(_train_zero3(probed=True, storage=storage), _train_zero3(probed=False, storage=storage))


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_leaves_no_trace_under_zero3() -> None:
    run_distributed_test(_check_zero3, 2, timeout_seconds=200)
