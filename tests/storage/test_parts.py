"""What a rank holds of a DTensor, on a mesh of one rank; sums over ranks are in tests/multiprocess."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from gradckpt_dist.storage.parts import Shell, arrived, is_distributed, part_of, share_of, tokens_of
from gradckpt_dist.storage.saved import VersionCheck, without_memory


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def _distributed(mesh: DeviceMesh, *placements: Shard | Replicate) -> tuple[Tensor, DTensor]:
    part = torch.randn(3, 4)
    return part, DTensor.from_local(part, mesh, placements, run_check=False)


def test_of_plain_tensors_it_is_they_themselves() -> None:
    for tensor in (torch.ones(2), nn.Parameter(torch.ones(2))):
        assert part_of(tensor) is arrived(tensor) is tokens_of(tensor) is tensor
        assert share_of(tensor) == (tensor, 1)
        assert not is_distributed(tensor)


def test_of_dtensors_it_is_the_local_tensor_and_copies_are_counted(mesh: DeviceMesh) -> None:
    for placement, copies in ((Shard(0), 1), (Replicate(), 2)):
        part, tensor = _distributed(mesh, placement)
        assert part_of(tensor).data_ptr() == part.data_ptr()
        assert share_of(tensor)[1] == copies
        assert is_distributed(tensor)


def test_tokens_are_whole_unless_sharded_over_the_last_dimension(mesh: DeviceMesh) -> None:
    assert tokens_of(_distributed(mesh, Shard(0))[1]) is not None
    assert tokens_of(_distributed(mesh, Shard(1))[1]) is None


def test_a_shell_keeps_mesh_placements_and_shape(mesh: DeviceMesh) -> None:
    part, tensor = _distributed(mesh, Shard(0))
    again = Shell(tensor).around(part + 1)
    assert isinstance(again, DTensor)
    assert (again.shape, again.placements, again.device_mesh) == (torch.Size([6, 4]), (Shard(0),), mesh)
    assert torch.equal(again.to_local(), part + 1)


def test_a_witness_sees_writes_and_holds_nothing(mesh: DeviceMesh) -> None:
    _, tensor = _distributed(mesh, Shard(0))
    witness = without_memory(tensor)
    check = VersionCheck(tensor, witness)
    assert part_of(witness).numel() == 0
    assert part_of(tensor).numel() == 12
    assert not check.changed
    tensor.add_(1)
    assert check.changed
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        check.verify()
