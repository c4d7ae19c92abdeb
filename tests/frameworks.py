"""One small model of unlike blocks, wrapped for each data-parallel framework."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

WIDTH = 32
FRAMEWORKS = ("single", "ddp", "fsdp1", "fsdp1_flat", "fsdp2")


class Block(nn.Module):
    """Takes keywords and non-tensors, and returns what ``returns`` says: a tensor, a tuple or a dict."""

    def __init__(self, returns: str = "tensor") -> None:
        super().__init__()
        self.returns = returns
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None, debug: bool = False) -> Any:
        hidden = self.down(functional.gelu(self.up(self.norm(x)))) * scale
        if shift is not None and not debug:
            hidden = hidden + shift
        result = x + self.dropout(hidden)
        if self.returns == "tuple":
            return result, scale
        return {"hidden": result, "extra": None} if self.returns == "dict" else result


class Model(nn.Module):
    """Six blocks; the third is called twice, the second frozen, the first given an input that needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(kind) for kind in ("tensor", "tensor", "tensor", "tuple", "dict", "tensor"))
        self.head = nn.Linear(WIDTH, 4)
        self.blocks[1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        first, frozen, twice, pair, named, last = self.blocks
        shift = x.mean(0, keepdim=True)
        x = frozen(first(x), shift=shift)
        x = twice(twice(x, 0.5), debug=True)
        x, _ = pair(x, scale=2.0)
        x = named(x, shift=shift, debug=False)["hidden"]
        return self.head(last(x))


def wrap(model: nn.Module, framework: str) -> nn.Module:
    """The model as its users wrap it; frozen parameters stay out of FSDP1's flat ones."""
    if framework == "ddp":
        return DistributedDataParallel(model)
    if framework in {"fsdp1", "fsdp1_flat"}:
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({type(block) for block in model.blocks}),
            device_id=torch.device("cpu"),
            use_orig_params=framework == "fsdp1",
        )
    if framework == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


@contextmanager
def without_sync(model: nn.Module) -> Iterator[None]:
    """A micro-batch whose gradients are not exchanged."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    elif hasattr(model, "no_sync"):
        with model.no_sync():
            yield
    else:
        yield


def train(
    model: nn.Module,
    *,
    steps: int,
    accumulate: int = 1,
    autocast: bool = False,
    seed: int = 0,
    shape: tuple[int, ...] = (8, WIDTH),
) -> list[Tensor]:
    """Losses, gradients and buffers of every step, each rank on data of its own; RNG state last."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(100 + rank + seed)
    data = torch.Generator().manual_seed(rank + seed)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
    record: list[Tensor] = []
    for _ in range(steps):
        optimizer.zero_grad()
        for left in reversed(range(accumulate)):
            batch = torch.randn(shape, generator=data)
            if left:
                with without_sync(model):
                    record.append(_backward(model, batch, autocast))
            else:
                record.append(_backward(model, batch, autocast))
        record += [local(p.grad).clone() for p in model.parameters() if p.grad is not None]
        record += [buffer.clone() for buffer in model.buffers()]
        optimizer.step()
    return [*record, torch.get_rng_state()]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor."""
    part = getattr(tensor, "_local_tensor", tensor)
    return part if isinstance(part, Tensor) else tensor


def _backward(model: nn.Module, batch: Tensor, autocast: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(batch).float().square().mean()
    loss.backward()
    return loss.detach()


def assert_bitwise(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Same tensors, bit for bit."""
    assert len(ours) == len(theirs)
    for position, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(one, other), f"tensor {position} differs by {(one - other).abs().max()}"
