"""Running averages that steps keep, and what happens around them.

The step itself updates the average of each parameter that it steps. At the first update of an optimizer, which copies
the parameters, it does so too, from what was before the step; the copy follows (`copy_first`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .masters import master_of

EMA = "ema"  # the key in a parameter's state


def all_params(optimizer: Any) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def is_first_update(optimizer: Any) -> bool:
    """Whether no average was ever updated; to be asked before state is made."""
    return not any(EMA in entry for entry in optimizer.state.values())


def begun(optimizer: Any, param: Tensor) -> Tensor:
    """The running average of a parameter before its first update."""
    weights = _weights(optimizer, param)
    return weights.clone(memory_format=torch.preserve_format) if weights.dtype == param.dtype else weights


@torch.no_grad()
def copy_first(optimizer: Any, params: list[Tensor]) -> None:
    """The first update, of parameters that were stepped."""
    for param in params:
        optimizer.state[param][EMA].copy_(_weights(optimizer, param))


@torch.no_grad()
def update(optimizer: Any, params: list[Tensor], ema_decay: float, found_inf: Tensor | None = None) -> None:
    """Any other update, of parameters that the plan did not step and which have an average.

    It is left out where a number on a GPU is not 0.
    """
    if not params:
        return
    averages = [_local(optimizer.state[param][EMA]) for param in params]
    values = [_local(_weights(optimizer, param)) for param in params]
    values = [value.to(average.dtype) for value, average in zip(values, averages, strict=True)]
    if found_inf is None:
        torch._foreach_lerp_(averages, values, 1 - ema_decay)
    else:
        updated = torch._foreach_lerp(averages, values, 1 - ema_decay)
        for average, value in zip(averages, updated, strict=True):
            average.copy_(torch.where(found_inf.to(average.device) == 0, value, average))


def update_after_torchs_step(optimizer: Any, ema_decay: float, first: bool) -> None:
    state = optimizer.state
    params = list(dict.fromkeys(p for p in all_params(optimizer) if p.grad is not None or EMA in state.get(p, ())))
    for param in params:
        if state[param].get(EMA) is None:
            state[param][EMA] = begun(optimizer, param)
    if first:
        copy_first(optimizer, params)
    else:
        update(optimizer, params, ema_decay)


def _local(tensor: Any) -> Tensor:
    """What is here of a DTensor, since torch takes none beside plain tensors; its average is placed as it is."""
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


def _weights(optimizer: Any, param: Tensor) -> Tensor:
    """What is averaged: the parameter or, of 16 bits, its master or itself in float32."""
    if param.dtype.itemsize >= 4:
        return param.detach()
    options = optimizer._fastopt_options
    return master_of(param, optimizer.state.get(param, {}) if options is not None and options.masters else {})
