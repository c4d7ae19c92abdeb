"""Which ranks run the same blocks, told from the model itself: data x tensor x context parallel, one pipeline stage."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from gradckpt_dist.errors import AgreementError
from gradckpt_dist.live_objects import live_objects

Domain = ProcessGroup | Sequence[int]
"""A process group, or global ranks in ascending order, this one among them."""

_PIPELINING = "torch.distributed.pipelining.stage"
_PIPELINE_DIMENSION = r"pp|pipe\w*|stages?"


def domain_of(model: nn.Module) -> tuple[int, ...] | None:
    """The global ranks that run the same blocks as ``model`` does here; None where the model does not say.

    Looked at are DDP's and FSDP1's process groups, and the meshes of FSDP1 and of DTensor parameters (FSDP2, tensor
    parallelism). A mesh that was cut from a larger one by names stands for all of the larger one but its pipeline
    dimension (``pp``, ``pipe…``, ``stage``). Several that do not hold each other span a grid. A model that says nothing
    and is a stage of a pipeline is on its own. No rank asks another.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    found = sorted({*_groups(model), *_meshes(model)}, key=lambda ranks: (-len(ranks), ranks))
    if not found:
        return (dist.get_rank(),) if _is_stage(model) else None
    domain = found[0]
    for ranks in found[1:]:
        domain = _spanned(domain, ranks)
    return domain


def global_ranks(domain: Domain | None) -> tuple[int, ...]:
    """The ranks of a domain; all for None.

    Raises:
        AgreementError: this rank is not among them.
    """
    if domain is None or isinstance(domain, ProcessGroup):
        ranks = tuple(dist.get_process_group_ranks(domain))
    else:
        ranks = tuple(domain)
    here = dist.get_rank()
    if here not in ranks:
        raise AgreementError(
            f"the process group holds ranks {list(ranks)} and not this one; give each rank the group of the ranks that "
            "run the same blocks",
            rank=here,
        )
    return ranks


def _groups(model: nn.Module) -> Iterator[tuple[int, ...]]:
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) or _is_fsdp1(module):
            for attribute in ("process_group", "_inter_node_pg"):
                group = getattr(module, attribute, None)
                if group is not None:
                    yield tuple(sorted(dist.get_process_group_ranks(group)))


def _meshes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    # FSDP1 flattens DTensors away; that it shards some is told by its own mesh, which was cut from theirs.
    found = [getattr(parameter, "device_mesh", None) for parameter in model.parameters()]
    found += [getattr(module, "_device_mesh", None) for module in model.modules() if _is_fsdp1(module)]
    for mesh in {id(mesh): mesh for mesh in found if mesh is not None}.values():
        root = mesh._get_root_mesh()
        is_cut = mesh.mesh_dim_names and set(mesh.mesh_dim_names) <= set(root.mesh_dim_names or ())
        yield _without_pipeline(root if is_cut else mesh)


def _is_fsdp1(module: nn.Module) -> bool:
    return "FullyShardedDataParallel" in {base.__name__ for base in type(module).__mro__}


def _without_pipeline(mesh: Any) -> tuple[int, ...]:
    """The ranks of this mesh that are at the same place of its pipeline dimension."""
    ranks, place = mesh.mesh, mesh.get_coordinate()
    for dimension, name in reversed(list(enumerate(mesh.mesh_dim_names or ()))):
        if re.fullmatch(_PIPELINE_DIMENSION, name):
            ranks = ranks.select(dimension, place[dimension])
    return tuple(sorted(map(int, ranks.flatten())))


def _spanned(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """The grid of which both are rows through this rank; the larger one if it holds the other."""
    if set(other) <= set(one):
        return one
    here = dist.get_rank()
    return tuple(sorted({a + b - here for a in one for b in other}))


def _is_stage(model: nn.Module) -> bool:
    """Whether a pipeline schedule runs this model as a stage of several."""
    pipelining = sys.modules.get(_PIPELINING)
    if pipelining is None:
        return False
    return any(stage.submod is model for stage in live_objects(pipelining._PipelineStageBase))
