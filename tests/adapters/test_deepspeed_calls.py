"""Models that call ``deepspeed.checkpointing.checkpoint``, and the section that configures it."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed_support import SETTINGS, Units, document, start, train, use_cpu
from frameworks import assert_bitwise
from models import operations
from support import run_distributed_test
from text_model import GPT, Block
from torch import Tensor, nn
from torch.nn import functional

import gradckpt_dist
from gradckpt_dist.errors import BlocksNotFoundError, ConfigError

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

WIDTH = 32


def checkpoint(function: Any, *args: Any) -> Any:
    import deepspeed

    return deepspeed.checkpointing.checkpoint(function, *args)


def non_reentrant_checkpoint(function: Any, *args: Any) -> Any:
    import deepspeed

    return deepspeed.checkpointing.non_reentrant_checkpoint(function, *args)


class Around(GPT):
    """Checkpoints each of its blocks, and what comes before and after them."""

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1])
        x = checkpoint(self.dropout, self.tokens(tokens) + self.positions(places))
        for i, block in enumerate(self.blocks):
            x = checkpoint(block, x) if i else non_reentrant_checkpoint(block, x)
        return self.head(non_reentrant_checkpoint(self.norm, x).flatten(0, 1))


class InsideBlock(Block):
    """Checkpoints its second half."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention_out(self._attend(self.attention_norm(x))))
        return x + checkpoint(lambda y: self.dropout(self.mlp_out(functional.gelu(self.mlp_in(self.mlp_norm(y))))), x)


class Functional(nn.Module):
    """No modules to find: four calls of functions, two of which return a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, WIDTH)
        self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) * 0.1 for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        x, y = self.tokens(tokens), self.tokens(tokens)
        for i in range(4):
            if i % 2:
                x = checkpoint(lambda x, weight: x + self._drop(x @ weight), x, self.weights[i])
            else:
                x, y = checkpoint(lambda x, y, i=i: (x + self._drop(y @ self.weights[i]), y), x, y)
        return (x @ self.tokens.weight.T).flatten(0, 1)

    def _drop(self, x: Tensor) -> Tensor:
        """As in a tensor-parallel region, from a random state of its own."""
        import deepspeed

        with deepspeed.checkpointing.get_cuda_rng_tracker().fork():
            return functional.dropout(x, 0.1, training=True)


def _build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "functional":
        import deepspeed

        tracker = deepspeed.checkpointing.get_cuda_rng_tracker()
        tracker.reset()
        tracker.add("model-parallel-rng", 7 + dist.get_rank())
        return Functional()
    sizes: Any = dict(vocabulary=11, context=16, width=WIDTH, layers=4, heads=2, dropout=0.1)
    if kind == "around":
        return Around(**sizes)
    model = GPT(**sizes)
    model.blocks = nn.ModuleList(InsideBlock(WIDTH, 2, 0.1) for _ in range(4))
    return model


def _check_model(kind: str, stage: int, names: tuple[str, ...], **sections: Any) -> None:
    plain = start(document(stage), _build(kind))
    reference = train(plain, 11)
    plain.destroy()
    trainer = start(document(stage, gradckpt=SETTINGS, **sections), _build(kind))
    engine = gradckpt_dist.enable(trainer)
    assert engine.mask.blocks == names
    masks, losses = [], []
    for _ in range(10):
        losses += train(trainer, 1)
        masks.append(engine.mask.storages)
    assert len(set(masks)) > 1
    engine.set_mask(["keep"] * 4)
    runs = engine.stats()["recomputes"]
    with operations() as seen:
        losses += train(trainer, 1)
    assert_bitwise(losses, reference)
    # Under `keep` nothing is run again, by DeepSpeed neither: as many products as without any checkpointing.
    assert engine.stats()["recomputes"] == runs
    products = sum(name.startswith(("aten.mm", "aten.addmm")) for name in seen)
    assert products == (3 * 5 if kind == "functional" else 3 * (4 * 4 + 1)), products
    engine.set_mask(["recompute"] * 4)
    train(trainer, 1)
    assert engine.stats()["recomputes"] == [run + 1 for run in runs]
    engine.disable()
    trainer.destroy()


def _check_section(messages: list[str]) -> None:
    section = {
        "partition_activations": True,
        "cpu_checkpointing": True,
        "number_checkpoints": 2,
        "contiguous_memory_optimization": True,
        "synchronize_checkpoint_boundary": True,
        "profile": True,
    }
    units = Units()
    losses = []
    for ours in (False, True):
        sections = {"gradckpt": {"log_level": "info"}, "activation_checkpointing": section} if ours else {}
        trainer = start(document(0, **sections), mpu=units)
        torch.manual_seed(1)  # tensor-parallel ranks have the same data and dropout
        engine = gradckpt_dist.enable(trainer) if ours else None
        if engine is not None:
            assert engine.mask.storages == ("recompute", "keep", "recompute", "keep")
            assert "offload" in engine.config.storages
            engine.set_mask(["recompute", "offload", "keep", "recompute"])
        losses.append(train(trainer, 3))
        if engine is not None:
            assert engine.stats()["recomputes"] == [3, 0, 0, 3]
            assert engine.gate.context.lane.pool.allocations > 0
            engine.disable()
        trainer.destroy()
    assert_bitwise(*losses)
    said = "\n".join(messages)
    for name in ("number_checkpoints 2", "cpu_checkpointing", "keep 1/2 of their inputs"):
        assert (name in said) == (dist.get_rank() == 0)
    for name in ("contiguous_memory_optimization", "synchronize_checkpoint_boundary", "profile"):
        assert said.count(f"activation_checkpointing.{name} is not carried out: ") == (dist.get_rank() == 0)


def _check_configured_by_the_script() -> None:
    """What the script gives to ``deepspeed.checkpointing.configure`` counts like the section."""
    from deepspeed.runtime.activation_checkpointing import checkpointing

    trainer = start(document(0, gradckpt={}))
    checkpointing.configure(None, num_checkpoints=1, checkpoint_in_cpu=True)
    engine = gradckpt_dist.enable(trainer)
    assert engine.mask.storages == ("recompute", "keep", "keep", "keep")
    assert "offload" in engine.config.storages
    engine.disable()
    engine = gradckpt_dist.enable(trainer, {"policy": "static", "every_n": 2, "storages": ["keep", "recompute"]})
    assert engine.mask.storages == ("recompute", "keep", "recompute", "keep")
    engine.disable()
    trainer.destroy()


def _check_refusals() -> None:
    trainer = start(document(0, gradckpt={}), _build("functional"))
    with pytest.raises(BlocksNotFoundError, match="number_checkpoints"):
        gradckpt_dist.enable(trainer)
    trainer.destroy()
    lossy = document(0, gradckpt={"gradient_tolerance": 0.1}, activation_checkpointing={"number_checkpoints": 4})
    trainer = start(lossy, _build("functional"))
    with pytest.raises(ConfigError, match=r"lossy.*gradient_tolerance to 0"):
        gradckpt_dist.enable(trainer)
    trainer.destroy()


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _check() -> None:
    use_cpu()
    handler = _Messages()
    logger = logging.getLogger("gradckpt_dist")
    logger.addHandler(handler)
    logger.setLevel("INFO")
    found = tuple(f"blocks.{i}" for i in range(4))
    _check_model("around", 0, found)
    _check_model("inside", 3, found)
    calls = tuple(f"checkpoint.{i}" for i in range(4))
    _check_model("functional", 2, calls, activation_checkpointing={"number_checkpoints": 4})
    _check_refusals()
    _check_configured_by_the_script()
    _check_section(handler.texts)  # last, as DeepSpeed remembers an mpu for good


def test_calls_are_under_the_mask_and_no_key_is_ignored() -> None:
    run_distributed_test(_check, 2, timeout_seconds=280)
