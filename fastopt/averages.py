"""Running averages that steps keep, and what happens around them.

The step itself updates the average of each parameter that it steps. At the first update of an optimizer, which copies
the parameters, it does so too, from what was before the step; the copy follows (`copy_first`).

torch.distributed.checkpoint loads what is in the state already, and lets a new optimizer make it by a step with lr 0.
That is no update: it leaves averages of NaN, which are open, and so does Adagrad's constructor, which makes state too.
What is still open after a load begins with the next step (`begin_open`), as if it were not there.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from .clip_dtensors import local_of
from .masters import master_of

EMA = "ema"  # the key in a parameter's state
_STATE_DICT = "torch.distributed.checkpoint.state_dict"


def all_params(optimizer: Any) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def is_first_update(optimizer: Any) -> bool:
    """Whether no average was ever updated; to be asked before state is made."""
    kept = [entry[EMA] for entry in optimizer.state.values() if _has_one(entry)]
    waiting = open_ones(optimizer)
    return not kept or 0 < len(waiting) == sum(local_of(average).numel() > 0 for average in kept)


def begun(optimizer: Any, param: Tensor) -> Tensor:
    """The running average of a parameter before its first update."""
    weights = _weights(optimizer, param)
    return weights.clone(memory_format=torch.preserve_format) if weights.dtype == param.dtype else weights


@torch.no_grad()
def copy_first(optimizer: Any, params: list[Tensor]) -> None:
    """The first update, of parameters that were stepped."""
    if _is_for_a_checkpoint():
        return leave_open(optimizer, params)
    for param in params:
        optimizer.state[param][EMA].copy_(_weights(optimizer, param))


@torch.no_grad()
def update(optimizer: Any, params: list[Tensor], ema_decay: float, found_inf: Tensor | None = None) -> None:
    """Any other update, of parameters that the plan did not step and which have an average.

    It is left out where a number on a GPU is not 0.
    """
    params = list(dict.fromkeys(params))  # one may be listed twice
    if not params:
        return
    # Of DTensors what is here, since torch takes none beside plain tensors; an average is placed as its parameter.
    averages = [local_of(optimizer.state[param][EMA]) for param in params]
    values = [local_of(_weights(optimizer, param)) for param in params]
    values = [value.to(average.dtype) for value, average in zip(values, averages, strict=True)]
    if found_inf is None:
        torch._foreach_lerp_(averages, values, 1 - ema_decay)
    else:
        updated = torch._foreach_lerp(averages, values, 1 - ema_decay)
        for average, value in zip(averages, updated, strict=True):
            average.copy_(torch.where(found_inf.to(average.device) == 0, value, average))


def update_after_torchs_step(optimizer: Any, ema_decay: float, first: bool) -> None:
    state = optimizer.state
    params = list(dict.fromkeys(p for p in all_params(optimizer) if p.grad is not None or _has_one(state.get(p))))
    for param in params:
        if state[param].get(EMA) is None:
            state[param][EMA] = begun(optimizer, param)
    if first:
        copy_first(optimizer, params)
    else:
        update(optimizer, params, ema_decay)


def _has_one(entry: dict[str, Any] | None) -> bool:
    return entry is not None and entry.get(EMA) is not None


def _weights(optimizer: Any, param: Tensor) -> Tensor:
    """What is averaged: the parameter or, of 16 bits, its master or itself in float32."""
    if param.dtype.itemsize >= 4:
        return param.detach()
    options = optimizer._fastopt_options
    return master_of(param, optimizer.state.get(param, {}) if options is not None and options.masters else {})


# ---- averages that are there to be loaded


@torch.no_grad()
def leave_open(optimizer: Any, params: list[Tensor]) -> None:
    for param in params:
        optimizer.state[param][EMA].fill_(math.nan)
    optimizer._fastopt_options.may_be_open = True


def open_ones(optimizer: Any) -> list[Tensor]:
    """The parameters whose averages were made to be loaded, and were not."""
    options = getattr(optimizer, "_fastopt_options", None)
    if options is None or not options.may_be_open:
        return []
    return [param for param, entry in optimizer.state.items() if _has_one(entry) and _is_open(entry[EMA])]


def has_begun(entry: dict[str, Any]) -> bool:
    """Whether there is an average in a parameter's state, of whatever optimizer, and none to be loaded."""
    return _has_one(entry) and not _is_open(entry[EMA])


def find_open(optimizer: Any) -> None:
    """After a load."""
    optimizer._fastopt_options.may_be_open = True
    optimizer._fastopt_options.may_be_open = bool(open_ones(optimizer))


def _is_open(average: Any) -> bool:
    """Of a DTensor, the part that is here, unless it is empty: all processes shall have the same entries."""
    local = local_of(average)
    return isinstance(local, Tensor) and local.numel() > 0 and bool(local.isnan().all())


def begin_open(optimizer: Any) -> None:
    """After a step: the first update of averages that are open, also of parameters without gradient."""
    if not _is_for_a_checkpoint():
        copy_first(optimizer, open_ones(optimizer))
        optimizer._fastopt_options.may_be_open = False


def _is_for_a_checkpoint() -> bool:
    """Whether the step that is under way is torch.distributed.checkpoint's, which makes state to be loaded."""
    frame = sys._getframe(1) if _STATE_DICT in sys.modules else None
    while frame and (frame.f_code.co_name, frame.f_globals.get("__name__")) != ("_init_optim_state", _STATE_DICT):
        frame = frame.f_back
    return frame is not None
