"""Which forwards go through a storage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradckpt_dist import StorageError
from gradckpt_dist.runtime import BlockRuntime, Gate


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def block() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


def _step(runtime: BlockRuntime, block: nn.Module) -> Tensor:
    output = runtime(block, (torch.ones(2, 3),), {})
    assert isinstance(output, Tensor)
    if output.requires_grad:
        output.sum().backward()
    return output


def test_a_closed_gate_and_no_grad_leave_the_block_alone(gate: Gate, block: nn.Module) -> None:
    runtime = BlockRuntime(0, block, gate)
    runtime.use("recompute")
    gate.watch = pytest.fail  # type: ignore[assignment]
    assert not runtime.reruns
    _step(runtime, block)
    gate.open = True
    assert runtime.reruns
    with torch.no_grad():
        assert not runtime.reruns
        assert not _step(runtime, block).requires_grad
    assert runtime.recomputes == 0


def test_an_open_gate_uses_the_storage_in_force(gate: Gate, block: nn.Module) -> None:
    runtime = BlockRuntime(0, block, gate)
    gate.open = True
    for storage, recomputes in (("keep", 0), ("recompute", 1), ("recompute", 2), ("keep", 2), ("recompute", 3)):
        runtime.use(storage)
        assert runtime.reruns == (storage == "recompute")
        _step(runtime, block)
        assert runtime.recomputes == recomputes


def test_a_watch_sees_index_storage_and_arguments(gate: Gate, block: nn.Module) -> None:
    seen: list[tuple[int, str, Any, Any]] = []

    def watch(index: int, storage: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        seen.append((index, storage.name, args, kwargs))
        return storage.run(forward, *args, **kwargs)

    runtime = BlockRuntime(3, block, gate)
    gate.open, gate.watch = True, watch
    x = torch.ones(1, 3)
    runtime(block, (), {"input": x})
    runtime.use("recompute")
    runtime(block, (x,), {})
    assert seen == [(3, "keep", (), {"input": x}), (3, "recompute", (x,), {})]


def test_an_unknown_storage_leaves_the_one_in_force(gate: Gate, block: nn.Module) -> None:
    runtime = BlockRuntime(0, block, gate)
    gate.open = True
    runtime.use("recompute")
    with pytest.raises(StorageError, match="storage 'zip' is not available"):
        runtime.use("zip")
    _step(runtime, block)
    assert runtime.recomputes == 1
