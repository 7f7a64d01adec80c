"""The norm of DTensors: of the shards here, then one number of each process to all, in one all-reduce of the mesh.

A process counts the part of a tensor that it has, unless that is a replica of another's. Each writes its number into
its own place of a vector of zeros that is summed over the mesh: the numbers arrive as they are, and are added in the
order of the processes, so that all have the same bits. A mesh of several dimensions takes an all-reduce along each of
those over which anything is sharded; tensors that are replicated everywhere take none.

The functions by name take DTensors of one CPU mesh that are sharded or replicated, and leave the rest to torch. A step
that clips takes those of several meshes too, all on the CPU or all on GPUs, and plain tensors beside them: `Meshes`. On
GPUs the norm stays there, and nothing waits for it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .backends import _C

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from .extras import Extras

Placed = dict[Any, list[int]]  # by placements: places in a list of tensors
Meshes = dict[Any, Placed]

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
        placed = all(map(_is_taken, tensor.placements))
        taken = taken and placed and tensor.device_mesh == mesh and tensor.dtype in _DTYPES
    # A product of float32 numbers and a float64 norm depends on their shapes: torch's.
    return tensors if taken and (len(dtypes) == 1 or torch.float64 not in dtypes) else None


@torch.no_grad()
def total_norm(tensors: list[DTensor], order: float) -> DTensor:
    """Their norm, a DTensor that is replicated over the mesh, as torch's is."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = tensors[0].device_mesh

    def norm_of(places: list[int]) -> float | Tensor:
        return local_norm([tensors[at]._local_tensor for at in places], order)

    placed: Placed = {}
    for at, tensor in enumerate(tensors):
        placed.setdefault(tensor.placements, []).append(at)
    total = _over_mesh(mesh, placed, norm_of, order)
    if tensors[0].dtype != torch.float64:
        total = total.float()
    return DTensor.from_local(total, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _over_mesh(mesh: Any, placed: Placed, norm_of: Callable[[list[int]], float | Tensor], order: float) -> Tensor:
    """In float64, of what the processes of the mesh have together, each of it once."""
    from torch.distributed import all_reduce

    coordinate = mesh.get_coordinate()
    dims = [dim for dim in range(mesh.ndim) if any(_splits(placements[dim]) for placements in placed)]
    counted = [placements for placements in placed if all(coordinate[d] == 0 or _splits(placements[d]) for d in dims)]
    own = sorted(at for placements in counted for at in placed[placements])
    norms = torch.zeros([mesh.size(dim) for dim in dims], dtype=torch.float64, device=mesh.device_type)
    norms[tuple(coordinate[dim] for dim in dims)] = norm_of(own)
    for dim in dims:
        all_reduce(norms, group=mesh.get_group(dim))
    return _norm(norms.flatten(), order)


def _norm(numbers: Tensor, order: float) -> Tensor:
    if numbers.device.type == _C.gpu_type():
        return cast(Tensor, torch.linalg.vector_norm(numbers, order))
    return cast(Tensor, _C.total_norm(numbers, order, False))


def local_of(tensor: Any) -> Any:
    """What is here of a DTensor; anything else as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def any_dtensor(params: list[Any]) -> bool:
    """So that what is here of their gradients is not all."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(type(param) is module.DTensor for param in params)


def _splits(place: Any) -> bool:
    """A _StridedShard is what is left of a shard of the tensor parallel kind when FSDP2 shards it again."""
    return type(place).__name__ in ("Shard", "_StridedShard")


def _is_taken(place: Any) -> bool:
    return _splits(place) or type(place).__name__ == "Replicate"


def meshes_of(params: list[Any]) -> Meshes | None:
    """The places in the list of the parameters on each mesh; None if there is one that is not taken.

    The same answer in all processes, whatever gradients they have: all take part in the same reductions. What is no
    DTensor is in each process, as a tensor that is replicated on the first mesh.
    """
    module: Any = sys.modules.get("torch.distributed.tensor")
    meshes: Meshes = {}
    plain = []
    for at, param in enumerate(params):
        if module is None or type(param) is not module.DTensor:
            plain.append(at)
            continue
        spec = param._spec
        meshes.setdefault(spec.mesh, {}).setdefault(spec.placements, []).append(at)
    devices = {param.device.type for param in params} | {mesh.device_type for mesh in meshes}  # not if offloaded
    if len(devices) > 1 or not devices <= {"cpu", _C.gpu_type()}:
        return None
    if not all(_is_taken(place) for placed in meshes.values() for placements in placed for place in placements):
        return None
    if meshes and plain:
        mesh, placed = next(iter(meshes.items()))
        placed.setdefault((module.Replicate(),) * mesh.ndim, []).extend(plain)
    return meshes


def is_placed_as_its_grad(param: Any) -> bool:
    """Or has none. The plan refuses those that are not."""
    grad = param.grad
    return grad is None or getattr(grad, "placements", None) == getattr(param, "placements", None)


@torch.no_grad()
def norm_of_step(optimizer: Any, params: list[Any], extras: Extras) -> float | Tensor | None:
    """The norm of all gradients of a step, after unscaling, where they are of several processes: the same in all.

    Returns:
        A number; on GPUs a tensor there, for which nothing waits; None if this module does not take the parameters.
    """
    if (meshes := meshes_of(params)) is None:
        return None
    if not are_on_gpu(meshes):
        return norm_over(meshes, functools.partial(_C.norm_of, optimizer)).item()
    from . import gpu_passes  # and Triton with it

    local = [local_of(param.grad) for param in params]

    def norm_of(places: list[int]) -> float | Tensor:
        return _norm_on_gpu([local[at] for at in places if local[at] is not None], extras.inverse_scale)

    norm = norm_over(meshes, norm_of)
    if extras.error_if_nonfinite:
        gpu_passes.refuse_nonfinite(norm, 2.0)
    return norm if any(param.dtype == torch.float64 for param in params) else norm.float()


def are_on_gpu(meshes: Meshes) -> bool:
    return any(mesh.device_type == _C.gpu_type() for mesh in meshes)


def _norm_on_gpu(grads: list[Tensor], inverse_scale: float | Tensor | None) -> float | Tensor:
    from .gpu_passes import search

    if not grads:
        return 0.0
    if found := search(grads, inverse_scale, torch.float64):
        return found[0]
    return local_norm(grads if inverse_scale is None else [grad * inverse_scale for grad in grads], 2.0)


@torch.no_grad()
def norm_over(meshes: Meshes, norm_of: Callable[[list[int]], float | Tensor]) -> Tensor:
    """The norm of the gradients of a step, the same in all processes, float64. ``norm_of``: of those at some places.

    Raises:
        RuntimeError: a parameter is on a mesh without this process.
    """
    norms = [_over_mesh(mesh, its, norm_of, 2.0) for mesh, its in meshes.items() if mesh.get_coordinate() is not None]
    if len(norms) != len(meshes):  # after the reductions of the others, which wait for this process
        raise RuntimeError(
            "max_grad_norm: a parameter is a DTensor on a device mesh without this process, which cannot know the norm "
            "of its gradient; give the optimizer only parameters of this process, or clip beside the step"
        )
    return norms[0] if len(norms) == 1 else _norm(torch.stack(norms), 2.0)


def local_norm(tensors: list[Tensor], order: float) -> float | Tensor:
    """Not rounded to float32. Whatever the tensors are: no process may answer otherwise than the others."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if not tensors:
        return 0.0
    norm = _C.norm(tensors, order)
    if isinstance(norm, float):
        return norm
    wide = [torch.complex128 if tensor.is_complex() else torch.float64 for tensor in tensors]
    norms = [torch.linalg.vector_norm(tensor, order, dtype=d) for tensor, d in zip(tensors, wide, strict=True)]
    return cast(Tensor, torch.linalg.vector_norm(torch.stack(norms), order))


def replicated(norm: Any) -> Tensor | None:
    """The number that a DTensor is in every process; None if it is no such DTensor on the CPU."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    if module is None or type(norm) is not module.DTensor or norm.device_mesh.device_type != "cpu":
        return None
    return norm._local_tensor if all(place.is_replicate() for place in norm.placements) else None


def refuse_nonfinite(norm: Tensor, order: float) -> None:
    """As torch's functions with ``error_if_nonfinite``."""
    _C.total_norm(norm, order, True)  # the norm of a norm


@torch.no_grad()
def scale_(tensors: list[Any], factor: float) -> None:
    """Multiplies DTensors, or their local tensors, by a number, in place."""
    local = [local_of(tensor) for tensor in tensors]
    if _C.scale_(local, factor):
        torch._foreach_mul_(local, factor)
