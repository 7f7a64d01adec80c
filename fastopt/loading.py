"""Loading a state_dict, of these optimizers or of torch's: checked before torch's own load, and made whole after it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .algorithm import Group
from .averages import EMA, find_open
from .extras import KEPT
from .masters import COMPANIONS, NO_MASTERS, has_companion, is_companion
from .state import state_dtype

_IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")
# What a step makes anew in a state that lacks it, of what options add.
_OPTIONAL = (EMA, "rounding_seed", "step")


def load(self: Any, torchs_load: Callable[[dict[str, Any]], None], state_dict: dict[str, Any]) -> None:
    """What `FusedStep.load_state_dict` says."""
    own: list[dict[str, Any]] = []
    loaded: list[tuple[Tensor, dict[str, Any]]] = []
    masters = self._fastopt_options is not None and self._fastopt_options.masters

    def check(_: Optimizer, final: dict[str, Any]) -> None:
        for group in self.param_groups:
            own.append({name: group[name] for name in _IMPLEMENTATION if name in group})
        for group, saved in zip(self.param_groups, final["param_groups"], strict=False):
            for param, key in zip(group["params"], saved["params"], strict=False):
                if entry := final["state"].get(key):
                    _check_loaded(self, {**self.defaults, **saved}, param, key, entry)
                    loaded.append((param, entry))

    def restore(_: Optimizer) -> None:
        for group, values in zip(self.param_groups, own, strict=True):
            group.update(values)
        groups = {param: group for group in self.param_groups for param in group["params"]}
        for param, entry in loaded:
            capturable, dtype = groups[param].get("capturable"), state_dtype(self, param)
            slots = {} if dtype is None else self._fastopt.slots(self, groups[param])
            for name, value in entry.items():
                if not torch.is_tensor(value):
                    if name in _OPTIONAL and _is_absent(value):
                        self.state[param].pop(name)
                    continue
                if name == "step":
                    value = value.to(param.device, torch.float32) if capturable else value.cpu()
                elif name in slots:
                    value = value.to(param.device, dtype)
                elif (value.dtype in KEPT and param.is_floating_point()) or is_companion(name, value, param):
                    value = value.to(param.device)
                else:
                    continue
                self.state[param][name] = value
        if masters:
            _drop_cast_companions(self, [param for param, _ in loaded])
        if self._fastopt_options is not None:
            find_open(self)

    handles = [
        self.register_load_state_dict_pre_hook(check),  # the last: it sees what the user's hooks made of the file
        self.register_load_state_dict_post_hook(restore, prepend=True),  # and the first
    ]
    try:
        torchs_load(state_dict)
    finally:
        for handle in handles:
            handle.remove()


def _check_loaded(self: Any, group: Group, param: Tensor, key: Any, entry: dict[str, Any]) -> None:
    has_step = self._fastopt.has_step
    slots = list(self._fastopt.slots(self, group))
    beside = [name for name, value in entry.items() if is_companion(name, value, param)]
    beside += [EMA] * (not _is_absent(entry.get(EMA)))
    for name in ["step"] * has_step + slots + beside:
        value = entry.get(name)
        if value is None and not has_step:
            continue  # as torch: made at the next step
        if value is None:
            found = sorted(str(key) for key, value in entry.items() if value is not None)
            raise ValueError(f"loaded state of parameter {key} has no {name!r}, only {found}")
        if name == "step":
            if not (isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)):
                raise ValueError(f"loaded 'step' of parameter {key} is no number: {value!r}")
        elif not isinstance(value, Tensor):
            raise ValueError(f"loaded {name!r} of parameter {key} is no tensor: {value!r}")
        elif value.shape != param.shape:
            shapes = f"shape {list(value.shape)}, the parameter {list(param.shape)}"
            raise ValueError(f"loaded {name!r} of parameter {key} has {shapes}")


def _is_absent(value: Any) -> bool:
    """An empty dict is what `set_optimizer_state_dict` makes of an entry that a flattened file lacks."""
    return value is None or (isinstance(value, dict) and not value)


def _drop_cast_companions(self: Any, params: list[Tensor]) -> None:
    """After a load: what is no master of a 16-bit parameter is made anew at the next step."""
    lacking = [p for p in params if p.dtype in COMPANIONS and not has_companion(self.state[p], p)]
    for param in lacking:
        self.state[param].pop(COMPANIONS[param.dtype][0], None)
    if lacking:
        warnings.warn(NO_MASTERS.format(count=len(lacking)), stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """For a warning: how far up the line is that called this library, behind torch's wrappers."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "fastopt"):
        level, frame = level + 1, frame.f_back
    return level
