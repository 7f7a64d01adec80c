"""What a step does beside torch's where torch's own step has to run: around it, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from . import clip_dtensors
from .averages import all_params
from .backends import is_capturing, torch_steps
from .clip_grad import clip_grad_norm_, clip_grads_with_norm_, coefficient, get_total_norm
from .extras import Extras
from .masters import COMPANIONS

NOT_BESIDE = (
    "{option}: torch's own step would have to run, which rounds 16-bit parameters to nearest, because {reason}. "
    "Nothing was changed. Step such parameters with an optimizer of their own, without {option}."
)
NOT_SEEN_IN_A_GRAPH = (
    "found_inf: torch's own step would have to run, because {reason}, and while a CUDA graph is captured nobody can "
    "look whether it shall. Nothing was changed. Capture the loop without this step, or step such parameters with an "
    "optimizer of their own, without found_inf"
)


def step_with_changed_grads(
    optimizer: Any, reason: str, extras: Extras, step: Callable[[Any, Extras], None]
) -> None:
    """The same as in the step, where the plan cannot: the optimizer steps with changed copies of the gradients."""
    params = [param for param in all_params(optimizer) if param.grad is not None]
    grads: list[Any] = [param.grad for param in params]
    torch_steps[f"{type(optimizer).__name__}, clipped or unscaled beside the step: {reason}"] += 1
    differentiable = any(group.get("differentiable") for group in optimizer.param_groups)
    try:
        with torch.set_grad_enabled(differentiable):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
        norm = None
        with torch.no_grad():
            if (factor := extras.inverse_scale) is not None:
                for param in params:
                    cast(Tensor, param.grad).mul_(factor.to(param.device) if isinstance(factor, Tensor) else factor)
            if extras.max_norm is not None:
                optimizer._fastopt_options.refuse_parts(optimizer)
                norm = _clip(all_params(optimizer), extras.max_norm, extras.error_if_nonfinite)
        step(optimizer, Extras(ema_decay=extras.ema_decay, masters=extras.masters, draws=extras.draws))
        optimizer._fastopt_options.norm = norm
    finally:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad


def _clip(params: list[Tensor], max_norm: float, error_if_nonfinite: bool) -> Tensor:
    """As in the step: also where torch's function refuses, for DTensors beside plain tensors or on several meshes."""
    meshes = clip_dtensors.meshes_of(params)
    if meshes and not all(map(clip_dtensors.is_placed_as_its_grad, params)):
        norm = get_total_norm([param.grad for param in params if param.grad is not None], 2.0, error_if_nonfinite)
        # One by one: torch 2.10's product of a list leaves DTensors that are Partial as they were.
        clip_grads_with_norm_(params, max_norm, norm, foreach=False)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if not meshes or clip_dtensors.are_on_gpu(meshes):
        norm = clip_grad_norm_(params, max_norm, error_if_nonfinite=error_if_nonfinite)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    local = [clip_dtensors.local_of(param.grad) for param in params]

    def norm_of(places: list[int]) -> float | Tensor:
        return clip_dtensors.local_norm([local[at] for at in places if local[at] is not None], 2.0)

    f64 = any(param.dtype == torch.float64 for param in params)
    norm = clip_dtensors.norm_over(meshes, norm_of).to(torch.float64 if f64 else torch.float32)
    if error_if_nonfinite:
        clip_dtensors.refuse_nonfinite(norm, 2.0)
    clip_dtensors.scale_([grad for grad in local if grad is not None], coefficient(max_norm, norm))
    return norm


@torch.no_grad()
def is_left_out(optimizer: Any, extras: Extras | None, reason: str = "") -> bool:
    """Whether infinities are found, where the update cannot look: the host waits for it."""
    if extras is None or (found := extras.found_inf) is None:
        return False
    if is_capturing(found.device):
        raise RuntimeError(NOT_SEEN_IN_A_GRAPH.format(reason=reason))
    if extras.searches:
        grads = [param.grad for param in all_params(optimizer) if param.grad is not None]
        scale = cast(Tensor, extras.inverse_scale)
        finite = [(grad * scale.to(grad.device)).isfinite().all().to(found.device) for grad in grads]
        found.copy_(torch.stack(finite).logical_not().any())
    return bool(found != 0)


def refuse_torchs_step(optimizer: Any, reason: str) -> None:
    """Where it would take something else for a 16-bit parameter than was asked for."""
    options = optimizer._fastopt_options
    if options is None or not options.keeps_more():
        return
    if any(param.dtype in COMPANIONS and param.grad is not None for param in all_params(optimizer)):
        option = "master_weights" if options.masters else "stochastic_rounding"
        raise RuntimeError(NOT_BESIDE.format(option=option, reason=reason))
