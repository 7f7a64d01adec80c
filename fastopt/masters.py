"""Master weights: what 16-bit parameters lack to be the float32 weights that they stand for.

A bfloat16 parameter and an int16 `remainder` in its state are the two halves of a float32 number; beside a float16
parameter the whole number is kept, its `master`. csrc/step/round.h and companions.h join and part them in the step;
here is what happens around it.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

COMPANIONS = {torch.bfloat16: ("remainder", torch.int16), torch.float16: ("master", torch.float32)}

NO_MASTERS = (
    "the loaded state of {count} bfloat16 or float16 parameters has no master weights, or torch has cast them: they "
    "begin with the values of the parameters"
)


def is_companion(name: str, value: Any, param: Tensor) -> bool:
    """Whether an entry of a parameter's state is its companion."""
    return isinstance(value, Tensor) and COMPANIONS.get(param.dtype) == (name, value.dtype)


def has_companion(entry: dict[str, Any], param: Tensor) -> bool:
    name, _ = COMPANIONS.get(param.dtype, ("", None))
    return is_companion(name, entry.get(name), param)


def add_companion(entry: dict[str, Any], param: Tensor) -> None:
    """Gives the state of a 16-bit parameter the companion that makes a master of what it is, unless it has one."""
    if param.dtype in COMPANIONS and not has_companion(entry, param):
        name, dtype = COMPANIONS[param.dtype]
        if entry.get(name) is not None:  # it came by another way than our load_state_dict, which would have said so
            warnings.warn(NO_MASTERS.format(count="some"), stacklevel=2)
        if dtype == torch.int16:
            entry[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
        else:
            entry[name] = param.detach().to(dtype)


@torch.no_grad()
def master_of(param: Tensor, entry: dict[str, Any]) -> Tensor:
    """The master of a 16-bit parameter with this state, as a float32 tensor of its own."""
    wide = param.detach().to(torch.float32)
    if not has_companion(entry, param):
        return wide
    companion = entry[COMPANIONS[param.dtype][0]]
    if hasattr(param, "to_local"):  # a DTensor, of which each rank joins its own
        dtensor: Any = wide
        local = _join(param.to_local(), companion.to_local(), dtensor.to_local())
        shape = {"shape": wide.shape, "stride": wide.stride()}
        made: Tensor = dtensor.from_local(local, dtensor.device_mesh, dtensor.placements, run_check=False, **shape)
        return made
    return _join(param.detach(), companion, wide)


def _join(param: Tensor, companion: Tensor, wide: Tensor) -> Tensor:
    if param.dtype == torch.float16:
        followed = companion.to(torch.float16).view(torch.int16) == param.view(torch.int16)
        return torch.where(followed, companion, wide)
    joined = (wide.view(torch.int32) + companion.to(torch.int32)).view(torch.float32)
    return torch.where(joined.isnan(), wide, joined)


def master_weights(*optimizers: Optimizer) -> dict[Tensor, Tensor]:
    """The float32 weights behind 16-bit parameters: to save, to average or to merge.

    Args:
        optimizers: those that have them, made with ``master_weights=True``.

    Returns:
        A float32 tensor, shaped as the parameter and of its own memory, for each bfloat16 and float16 parameter that
        has one. Other parameters are what is stepped, and not in it; nor are those never stepped.

    Raises:
        ValueError: none of the optimizers has master weights.

    >>> import torch, fastopt
    >>> weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    >>> optimizer = fastopt.SGD([weight], lr=2**-10, master_weights=True)
    >>> weight.grad = torch.ones_like(weight)
    >>> optimizer.step()
    >>> weight.item(), fastopt.master_weights(optimizer)[weight].item()
    (1.0, 0.9990234375)
    """
    params = [
        (param, optimizer.state[param])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for param in group["params"]
        if param in optimizer.state
    ]
    masters = {param: master_of(param, entry) for param, entry in params if has_companion(entry, param)}
    if not masters:
        raise ValueError("no optimizer has master weights: make it with master_weights=True, and step once")
    return masters


def fp32_copy(model: Module, *optimizers: Optimizer) -> Module:
    """A deep copy of a model in float32, whose parameters have the values of their master weights: to save or to go on.

    Args:
        model: whose parameters the optimizers step.
        optimizers: those that have the weights, made with ``master_weights=True``.

    Returns:
        A model of its own. Its bfloat16 and float16 parameters and buffers are float32, those without master weights
        widened; others are copied as they are.

    Raises:
        ValueError: none of the optimizers has master weights.

    >>> import torch, fastopt
    >>> model = torch.nn.Linear(2, 1, dtype=torch.bfloat16)
    >>> optimizer = fastopt.AdamW(model.parameters(), master_weights=True)
    >>> model(torch.ones(2, dtype=torch.bfloat16)).backward()
    >>> optimizer.step()
    >>> full = fastopt.fp32_copy(model, optimizer)
    >>> full.weight.dtype, torch.equal(full.weight.bfloat16(), model.weight)
    (torch.float32, True)
    """
    masters = master_weights(*optimizers)
    made = copy.deepcopy(model)
    for param, own in zip(model.parameters(), made.parameters(), strict=True):
        if param.dtype in COMPANIONS:
            own.data = masters[param] if param in masters else own.data.float()
    for module in made.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dtype in COMPANIONS:
                setattr(module, name, buffer.float())
    return made
