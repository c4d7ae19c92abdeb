"""DeepSpeed's pipelines on one stage and two, with their own activation checkpointing and without."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed_support import SETTINGS, use_cpu
from frameworks import assert_bitwise
from support import run_distributed_test
from text_model import Block
from torch import Tensor, nn

import gradckpt_dist
from gradckpt_dist.launcher.script import ModelWatch

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

STEPS = 8


class Head(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(0, 1)


def _start(stages: int, interval: int, *, zero: int = 0, section: bool = True) -> Any:
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule

    torch.manual_seed(0)
    layers = [
        LayerSpec(nn.Linear, 11, 32),
        *(LayerSpec(Block, 32, 2, 0.1) for _ in range(6)),
        LayerSpec(Head, 32, 11),
    ]
    module = PipelineModule(
        layers,
        num_stages=stages,
        loss_fn=lambda logits, labels: nn.functional.cross_entropy(logits, labels.flatten()),
        activation_checkpoint_interval=interval,
        partition_method="uniform",
    )
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": zero},
        "zero_allow_untested_optimizer": True,
        "gradckpt": SETTINGS,
    }
    if not section:
        del config["gradckpt"]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    torch.manual_seed(dist.get_rank())
    return engine


def _batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    while True:
        tokens = torch.randint(11, (2, 17), generator=generator)
        # Reentrant checkpointing, DeepSpeed's default, needs inputs that can have a gradient.
        yield nn.functional.one_hot(tokens[:, :-1], 11).float(), tokens[:, 1:].contiguous()


def _train(trainer: Any, steps: int, batches: Iterator[Any]) -> list[Tensor]:
    return [trainer.train_batch(batches).detach().clone() for _ in range(steps)]


def _check(stages: int, interval: int, *, zero: int = 0, watched: bool = False) -> None:
    plain = _start(stages, interval, zero=zero, section=False)
    reference = _train(plain, STEPS, _batches())
    plain.destroy()

    trainer = _start(stages, interval, zero=zero)
    keys = set(trainer.module.state_dict())
    own = trainer.module.activation_checkpoint_func
    batches, losses, masks = _batches(), [], []
    watch = ModelWatch(None)
    if watched:  # as under `python -m gradckpt_dist run`
        watch.arm()
        losses += _train(trainer, 1, batches)
    engine = watch.engine if watched else gradckpt_dist.enable(trainer)
    assert engine is not None
    assert engine.config.interval == 4
    stage = trainer.stage_id
    first, last = (1, 6) if stages == 1 else ((1, 3), (4, 6))[stage]
    assert engine.mask.blocks == tuple(str(i) for i in range(first, last + 1))
    assert set(trainer.module.state_dict()) == keys
    while len(losses) < STEPS:
        losses += _train(trainer, 1, batches)
        masks.append(engine.mask.storages)
    assert_bitwise(losses, reference)
    assert len(set(masks)) > 1
    # Each block is recomputed by our storages alone, once in each micro-batch at most.
    assert 0 < max(engine.stats()["recomputes"]) <= 2 * STEPS
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (stage, masks, engine.mask.digest))
    of_stages = {one: [other for other in everyone if other[0] == one] for one in range(stages)}
    assert all(others == others[:1] * (len(everyone) // stages) for others in of_stages.values())

    state = engine.state_dict()
    names = [tempfile.mkdtemp()]
    dist.broadcast_object_list(names)
    trainer.save_checkpoint(names[0])
    engine.disable()
    assert trainer.module.activation_checkpoint_func is own
    trainer.destroy()
    again = _start(stages, interval, zero=zero)
    engine = gradckpt_dist.enable(again)
    again.load_checkpoint(names[0])
    assert Path(names[0], "latest").is_file()
    assert engine.state_dict() == state
    engine.disable()
    again.destroy()


def _check_two_stages() -> None:
    use_cpu()
    _check(2, 2, watched=True)


def _check_others() -> None:
    use_cpu()
    _check(1, 0)
    _check(1, 1, zero=1)
    _check(2, 0, zero=1)


def test_mask_of_each_stage_takes_over_the_pipelines_checkpointing() -> None:
    run_distributed_test(_check_two_stages, 2, timeout_seconds=250)


def _check_four_ranks() -> None:
    use_cpu()
    _check(2, 1)


@pytest.mark.slow
def test_two_stages_of_two_ranks_each() -> None:
    run_distributed_test(_check_four_ranks, 4, timeout_seconds=290)


@pytest.mark.slow
def test_one_stage_and_two_with_checkpointing_and_without() -> None:
    run_distributed_test(_check_others, 2, timeout_seconds=290)
