"""What there is to know of an optimizer beside its update: `_fastopt` of its class."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

Group = dict[str, Any]
# What torch's step calls of its object; the last is an older torch's name of the one before.
_PARTS_OF_STEP = ("_init_group", "_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")


class Algorithm:
    """Of an optimizer, beside its update and what torch's class says."""

    update: str  # the name of the update in csrc/step/algorithms.h and kernels/
    has_step: bool = True
    takes_sparse: bool = False

    def slots(self, optimizer: Optimizer, group: Group) -> dict[str, float]:
        """Names and initial values of a parameter's state tensors under the options of ``group``, in torch's order."""
        raise NotImplementedError

    def refusal(self, optimizer: Optimizer, group: Group, param: Tensor) -> Exception | None:
        """The error that torch's own step would raise half-way, after stepping other parameters."""
        grad = param.grad
        assert grad is not None
        if grad.shape != param.shape:
            return RuntimeError(f"grad has shape {list(grad.shape)}, the parameter {list(param.shape)}")
        if grad.device != param.device:
            return RuntimeError(f"grad is on {grad.device}, the parameter on {param.device}")
        if grad.is_sparse and not self.takes_sparse:
            return RuntimeError(f"{type(optimizer).__name__} does not support sparse gradients")
        if grad.is_sparse and group["weight_decay"] != 0:
            return RuntimeError("weight_decay option is not compatible with sparse gradients")
        if group.get("capturable") and param.device.type == "cpu":
            return AssertionError(
                "If capturable=True, params and state_steps must be on supported devices: cuda, xpu, hpu, ...; not cpu"
            )
        return None

    def before_torchs_step(self, optimizer: Optimizer) -> None:
        """Does what torch's own step takes for done."""

    def torchs_step_because(self, optimizer: Optimizer) -> str | None:
        """Why every step of this object is torch's own; asked by the plan at the first one and when a class changes."""
        cls = type(optimizer)
        not_torchs = [vars(base) for base in cls.__mro__ if not base.__module__.startswith("torch.")]
        for part in _PARTS_OF_STEP:
            # Not vars(optimizer): Python makes a dict for it then, and every attribute takes longer from there on.
            of_object = hasattr(cls, part) and getattr(optimizer, part) != getattr(cls, part).__get__(optimizer)
            if of_object or any(part in names for names in not_torchs):
                return f"{part} is not torch's"
        if optimizer._step_supports_amp_scaling:  # type: ignore[attr-defined]
            return "_step_supports_amp_scaling is set"
        return None


def same_dtype(optimizer: Optimizer, param: Tensor, slot: str) -> Exception | None:
    """For updates with a lerp of this slot, which torch does not promote."""
    assert param.grad is not None
    if param.grad.dtype != param.dtype:
        return RuntimeError(f"expected dtype {param.dtype} for grad but got dtype {param.grad.dtype}")
    state = optimizer.state.get(param, {}).get(slot)
    if state is not None and state.dtype != param.dtype:
        return RuntimeError(f"torch's own step expected dtype {param.dtype} for {slot!r} but got dtype {state.dtype}")
    return None
