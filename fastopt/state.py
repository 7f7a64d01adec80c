"""The state of parameters: made at their first step, or what it lacks; and unmade when that step is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .algorithm import Group
from .averages import EMA, begun, leave_open
from .backends import is_capturing
from .extras import Extras, seed_of
from .masters import COMPANIONS, add_companion


def refuse_capture(missing: list[tuple[Group, Tensor]]) -> None:
    """State that a graph makes is made again by each replay."""
    if any(is_capturing(param.device) for _, param in missing):
        from .gpu import NOT_WARM

        raise RuntimeError(NOT_WARM)


@_disable_dynamo
@torch.no_grad()
def make_state(self: Any, missing: list[tuple[Group, Tensor]], extras: Extras | None) -> list[Tensor]:
    """Makes the state of parameters at their first step, or what it lacks: a step count that can be read, an average.

    Returns the parameters whose slots were made.
    """
    fresh = []
    for group, param in missing:
        state = self.state[param]
        if self._fastopt.has_step and state:
            state["step"] = step_count(float(state["step"]), group, param)
        else:
            new = new_state(self, group, param)
            made = {name: value for name, value in new.items() if state.get(name) is None}
            state.update(made)
            fresh += [param] if made else []
        if extras is not None:
            add_beside(self, group, param, extras)
    return fresh


def new_state(self: Any, group: Group, param: Tensor) -> dict[str, Tensor]:
    state = {}
    if self._fastopt.has_step:
        state["step"] = step_count(0.0, group, param)
    like: dict[str, Any] = {"memory_format": torch.preserve_format, "requires_grad": False}
    like["dtype"] = state_dtype(self, param)
    for name, value in self._fastopt.slots(self, group).items():
        state[name] = torch.full_like(param, value, **like)
    return state


def state_dtype(self: Any, param: Tensor) -> torch.dtype | None:
    return None if self._fastopt_options is None else self._fastopt_options.state_dtype_of(param)


@torch.no_grad()
def remake_state(self: Any) -> None:
    """Gives state that torch's constructor has made the dtype that was asked for, and what the options add to it.

    So that torch.distributed.checkpoint, which loads what is there, finds it all.
    """
    extras = self._fastopt_options.extras
    for group in self.param_groups:
        for param in group["params"]:
            if param not in self.state:
                continue
            if state_dtype(self, param) is not None:
                new = new_state(self, group, param)
                self.state[param].update({name: new[name] for name in self._fastopt.slots(self, group)})
            if extras is not None:
                add_beside(self, group, param, extras)
                if extras.ema_decay is not None:
                    leave_open(self, [param])


def unmake_state(self: Any, made: list[tuple[Tensor, dict[str, Any] | None]]) -> None:
    for param, before in made:
        if before is None:
            self.state.pop(param, None)
        else:
            self.state[param].clear()
            self.state[param].update(before)


@torch.no_grad()
def add_beside(self: Any, group: Group, param: Tensor, extras: Extras) -> None:
    """Gives a parameter's state what it lacks beside the algorithm's."""
    state = self.state[param]
    if extras.masters:
        add_companion(state, param)
    if extras.draws and param.dtype in COMPANIONS:
        if not self._fastopt.has_step:
            state["step"] = step_count(float(state["step"] if state.get("step") is not None else 0), group, param)
        seed = state.get("rounding_seed")
        if isinstance(seed, Tensor) and seed.numel() == 1:  # made so by what saved it
            seed = seed.item()
        state["rounding_seed"] = self._fastopt_options.rounding_seed if seed is None else seed_of(seed)
    if extras.ema_decay is not None and state.get(EMA) is None:
        state[EMA] = begun(self, param)


def step_count(value: float, group: Group, param: Tensor) -> Tensor:
    """As torch makes them: read by the host, or by a captured graph."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.tensor(value, dtype=dtype, device=param.device if group.get("capturable") else "cpu")
