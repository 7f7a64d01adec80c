"""The norm of DTensors: of the shards here, then one number of each process to all, in one all-reduce of the mesh.

A process counts the part of a tensor that it has, unless that is a replica of another's. Each writes its number into
its own place of a vector of zeros that is summed over the mesh: the numbers arrive as they are, and are added in the
order of the processes, so that all have the same bits. A mesh of several dimensions takes an all-reduce along each of
those over which anything is sharded; tensors that are replicated everywhere take none.

Only DTensors of one CPU mesh that are sharded or replicated. The rest is torch's own.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .backends import _C

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dtensors_of_one_mesh(tensors: list[Any]) -> list[DTensor] | None:
    """The same list, if it is of what this module takes, else None. The same answer in all processes of the mesh."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    if module is None or not tensors or not all(type(tensor) is module.DTensor for tensor in tensors):
        return None
    mesh = tensors[0].device_mesh
    taken = mesh.device_type == "cpu" and mesh.get_coordinate() is not None
    dtypes = {tensor.dtype for tensor in tensors}
    for tensor in tensors:
        placed = all(type(place) in (module.Shard, module.Replicate) for place in tensor.placements)
        taken = taken and placed and tensor.device_mesh == mesh and tensor.dtype in _DTYPES
    # A product of float32 numbers and a float64 norm depends on their shapes: torch's.
    return tensors if taken and (len(dtypes) == 1 or torch.float64 not in dtypes) else None


@torch.no_grad()
def total_norm(tensors: list[DTensor], order: float) -> DTensor:
    """Their norm, a DTensor that is replicated over the mesh, as torch's is."""
    from torch.distributed import all_reduce
    from torch.distributed.tensor import DTensor, Replicate

    mesh = tensors[0].device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    dims = [dim for dim in range(mesh.ndim) if any(tensor.placements[dim].is_shard() for tensor in tensors)]
    own = [
        local
        for tensor in tensors
        if (local := tensor._local_tensor).numel()
        and all(coordinate[dim] == 0 or tensor.placements[dim].is_shard() for dim in dims)
    ]
    norms = torch.zeros([mesh.size(dim) for dim in dims], dtype=torch.float64)
    norms[tuple(coordinate[dim] for dim in dims)] = _local_norm(own, order)
    for dim in dims:
        all_reduce(norms, group=mesh.get_group(dim))
    total = _C.total_norm(norms.flatten(), order, False)
    if tensors[0].dtype != torch.float64:
        total = total.float()
    return DTensor.from_local(total, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _local_norm(tensors: list[Tensor], order: float) -> float | Tensor:
    """Not rounded to float32. Whatever the tensors are: no process may answer otherwise than the others."""
    if not tensors:
        return 0.0
    norm = _C.norm(tensors, order)
    if isinstance(norm, float):
        return norm
    norms = [torch.linalg.vector_norm(tensor, order, dtype=torch.float64) for tensor in tensors]
    return cast(Tensor, torch.linalg.vector_norm(torch.stack(norms), order))


def replicated(norm: Any) -> Tensor | None:
    """The number that a DTensor is in every process; None if it is no such DTensor on the CPU."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    if module is None or type(norm) is not module.DTensor or norm.device_mesh.device_type != "cpu":
        return None
    return norm._local_tensor if all(place.is_replicate() for place in norm.placements) else None


@torch.no_grad()
def scale_(tensors: list[DTensor], factor: float) -> None:
    """Multiplies them by a number, in place."""
    local = [tensor._local_tensor for tensor in tensors]
    if _C.scale_(local, factor):
        torch._foreach_mul_(local, factor)
