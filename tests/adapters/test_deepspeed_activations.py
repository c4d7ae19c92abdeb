"""``partition_activations`` on layers that are tensor-parallel indeed: equal inputs, other weights on each rank."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed_support import LAYERS, SETTINGS, Units, document, start, use_cpu
from frameworks import assert_bitwise
from models import operations
from support import run_distributed_test
from text_model import GPT
from torch import Tensor, nn
from torch.nn import functional

import gradckpt_dist

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

WIDTH = 128
BATCH, TOKENS = 2, 16
INPUT_BYTES = BATCH * TOKENS * WIDTH * 4
STEPS = 12


class _ToShards(torch.autograd.Function):
    """Each rank's layer is given the whole, whose gradient is the sum of what they send back."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return _summed(gradients[0])


class _FromShards(torch.autograd.Function):
    """The sum of what each rank's layer gives, whose gradient goes to all of them."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def _summed(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    return total


class ParallelBlock(nn.Module):
    """A column-parallel layer and a row-parallel one, as in Megatron: this rank has a share of the hidden units.

    Dropout between them draws other numbers on each rank, and dropout after them the same.
    """

    def __init__(self, ranks: int, dropout: float) -> None:
        super().__init__()
        self.parallel, self.dropout = ranks > 1, dropout
        self.norm = nn.LayerNorm(WIDTH)
        up, down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        rank = dist.get_rank() % ranks
        self.up_weight, self.up_bias = (nn.Parameter(part.chunk(ranks)[rank].clone()) for part in up.parameters())
        self.down_weight = nn.Parameter(down.weight.chunk(ranks, dim=1)[rank].clone())
        self.down_bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        import deepspeed

        whole = self.norm(x)
        whole = _ToShards.apply(whole) if self.parallel else whole
        hidden = functional.gelu(functional.linear(whole, self.up_weight, self.up_bias))
        with deepspeed.checkpointing.get_cuda_rng_tracker().fork():
            hidden = functional.dropout(hidden, self.dropout)
        part = functional.linear(hidden, self.down_weight)
        total = _FromShards.apply(part) if self.parallel else part
        return x + functional.dropout(total + self.down_bias, self.dropout)


def _build(ranks: int = 2, dropout: float = 0.1) -> GPT:
    """The same whole model for any number of ranks; this rank's part of it."""
    import deepspeed

    tracker = deepspeed.checkpointing.get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("model-parallel-rng", 7 + dist.get_rank())
    torch.manual_seed(0)
    model = GPT(vocabulary=11, context=TOKENS, width=WIDTH, layers=LAYERS, heads=2, dropout=dropout)
    model.blocks = nn.ModuleList(ParallelBlock(ranks, dropout) for _ in range(LAYERS))
    return model


def _loss(model: nn.Module) -> Tensor:
    tokens = torch.randint(11, (BATCH, TOKENS + 1))
    return functional.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:].flatten())


def _start(stage: int, units: Units, **sections: Any) -> Any:
    trainer = start(document(stage, **sections), _build(), mpu=units)
    torch.manual_seed(1)  # tensor-parallel ranks have the same data, and the same dropout outside of their shards
    return trainer


def _train(trainer: Any, steps: int) -> list[Tensor]:
    """Losses, gradients where DeepSpeed leaves them with the parameters, and the weights after each step."""
    record = []
    for _ in range(steps):
        loss = _loss(trainer)
        trainer.backward(loss)
        parameters = list(trainer.module.parameters())
        record += [loss.detach().clone(), *(p.grad.clone() for p in parameters if p.grad is not None)]
        trainer.step()
        record += [p.detach().clone() for p in parameters]
    return record


def _of_all_ranks(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _check_layers() -> None:
    """Each rank's gradients are its part of the whole model's."""
    gradients = []
    for ranks in (1, 2):
        model = _build(ranks, dropout=0.0)
        torch.manual_seed(1)
        _loss(model).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    whole, ours = gradients
    rank = dist.get_rank()
    for name, gradient in ours.items():
        dimension = 1 if name.endswith("down_weight") else 0
        is_part = gradient.shape != whole[name].shape
        assert is_part == name.endswith(("up_weight", "up_bias", "down_weight"))
        expected = whole[name].chunk(2, dimension)[rank] if is_part else whole[name]
        torch.testing.assert_close(gradient, expected)


def _check_training(stage: int, units: Units) -> None:
    """A mask that moves, and the same numbers as without us, bit for bit."""
    plain = _start(stage, units)
    reference = _train(plain, STEPS)
    parameters = dict(plain.module.named_parameters())
    up, norm = (_of_all_ranks(parameters[f"blocks.0.{name}"].detach()) for name in ("up_weight", "norm.weight"))
    assert not torch.equal(*up)
    assert torch.equal(*norm)
    assert stage or len(reference) == STEPS * (1 + 2 * len(parameters))
    plain.destroy()

    trainer = _start(stage, units, gradckpt=SETTINGS, activation_checkpointing={"partition_activations": True})
    engine = gradckpt_dist.enable(trainer)
    record, masks = [], []
    for _ in range(STEPS):
        record += _train(trainer, 1)
        masks.append(engine.mask.storages)
    assert_bitwise(record, reference)
    assert masks[0] == ("recompute",) * LAYERS
    assert len(set(masks)) > 1
    assert _of_all_ranks(masks) == [masks, masks]
    engine.disable()
    trainer.destroy()


def _kept(partition: bool, units: Units) -> tuple[int, int]:
    """With all blocks recomputed: what autograd and the storages hold at most, and the gathers of a step."""
    section = {"partition_activations": partition}
    settings = SETTINGS | {"policy": "static", "every_n": 1, "interval": 2}
    trainer = _start(0, units, gradckpt=settings, activation_checkpointing=section)
    engine = gradckpt_dist.enable(trainer)
    _train(trainer, 6)
    with operations() as names:
        loss = _loss(trainer)
        kept = [runtime._storage.held_bytes for runtime in engine._runtimes]
        assert kept == [INPUT_BYTES // 2 if partition else 0] * LAYERS  # inputs that stay whole are autograd's
        trainer.backward(loss)
        trainer.step()
    assert [runtime._storage.held_bytes for runtime in engine._runtimes] == [0] * LAYERS
    held_bytes = engine.stats()["held_bytes"]
    assert held_bytes > 0
    engine.disable()
    trainer.destroy()
    return held_bytes, sum("allgather" in name for name in names)


def _check() -> None:
    use_cpu()
    units = Units()
    _check_layers()
    for stage in (0, 2):
        _check_training(stage, units)
    (whole, none), (shared, gathers) = (_kept(partition, units) for partition in (False, True))
    assert whole - shared == LAYERS * INPUT_BYTES // 2
    assert (none, gathers) == (0, LAYERS)


def test_each_rank_keeps_its_share_of_a_recomputed_blocks_inputs() -> None:
    run_distributed_test(_check, 2, timeout_seconds=250)
