"""Clipping gradients, as torch.nn.utils.clip_grad does it: one pass for the norm of all, one for the product.

For any model and any optimizer. What is not a plain strided tensor of a floating dtype, all on CPU or all on one GPU,
nor a DTensor of such on CPU, is clipped by torch's own functions, and counted in `backend_info()`.
"""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn.utils import clip_grad as torch_clip_grad

from . import clip_dtensors
from .backends import _C, left_to_torch, on_gpu

Tensors = Tensor | Iterable[Tensor]


def clip_grad_norm_(
    parameters: Tensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scales the gradients of all parameters, in place, so that their norm as one vector is at most ``max_norm``.

    As torch.nn.utils.clip_grad_norm_: gradients are multiplied by max_norm / (norm + 1e-6) where that is below 1. Where
    it is not, they are not touched. With a norm that is NaN all gradients become NaN; with an infinite one the finite
    gradients become 0.

    Differs in the norm, whose squares and sums are float64: it is the exact norm, rounded once to float32 (float64 if a
    gradient is). torch sums in the dtype of the gradients, and returns three digits for bfloat16.

    Args:
        parameters: tensors, or one tensor, whose ``grad`` is clipped; those without are skipped.
        max_norm: the largest norm, a number >= 0.
        norm_type: order of the norm, ``2``, ``1`` or ``inf``; torch's own function computes others. Default 2.0.
        error_if_nonfinite: raise if the norm is NaN or infinite, before any gradient is changed. Default False.
        foreach: as in torch; chooses nothing here. Default None.

    Returns:
        The norm before clipping, a tensor without dimensions; 0 if there is no gradient.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set.

    >>> import torch, fastopt
    >>> x = torch.nn.Parameter(torch.zeros(2))
    >>> x.grad = torch.tensor([3.0, 4.0])
    >>> fastopt.clip_grad_norm_([x], max_norm=1.0)
    tensor(5.)
    >>> x.grad
    tensor([0.6000, 0.8000])
    """
    if is_dynamo_compiling() or _C is None:
        return _torch_clip_grad_norm(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    if type(parameters) is not list and not isinstance(parameters, Tensor):
        parameters = _listed(parameters)
    answer = _C.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)
    if type(answer) is Tensor or type(answer := on_gpu(answer, "clip", None, error_if_nonfinite)) is Tensor:
        return answer
    if grads := _dtensor_grads(parameters, norm_type):
        norm = get_total_norm(grads, norm_type, error_if_nonfinite)
        clip_dtensors.scale_(grads, coefficient(max_norm, cast(Any, norm)._local_tensor))
        return norm
    arguments = parameters, max_norm, norm_type, error_if_nonfinite, foreach
    return cast(Tensor, left_to_torch(_torch_clip_grad_norm, answer, *arguments))


def get_total_norm(
    tensors: Tensors, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> Tensor:
    """The norm of all tensors together, as if they were one vector.

    As torch.nn.utils.get_total_norm, with the exact sums of ``clip_grad_norm_``.

    Args:
        tensors: tensors, or one tensor; gradients as a rule.
        norm_type: order of the norm, ``2``, ``1`` or ``inf``; torch's own function computes others. Default 2.0.
        error_if_nonfinite: raise if the norm is NaN or infinite. Default False.
        foreach: as in torch; chooses nothing here. Default None.

    Returns:
        A tensor without dimensions; 0 if there is no tensor.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set.

    >>> import torch, fastopt
    >>> fastopt.get_total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
    tensor(5.)
    """
    if is_dynamo_compiling() or _C is None:
        return _torch_get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
    if type(tensors) is not list and not isinstance(tensors, Tensor):
        tensors = list(tensors)
    answer = _C.total_norm(tensors, norm_type, error_if_nonfinite)
    if type(answer) is Tensor or type(answer := on_gpu(answer, "norm", None, error_if_nonfinite)) is Tensor:
        return answer
    if found := _dtensors(tensors, norm_type):
        norm = clip_dtensors.total_norm(found, float(norm_type))
        if error_if_nonfinite:
            clip_dtensors.refuse_nonfinite(norm._local_tensor, float(norm_type))
        return norm
    return cast(Tensor, left_to_torch(_torch_get_total_norm, answer, tensors, norm_type, error_if_nonfinite, foreach))


def clip_grads_with_norm_(
    parameters: Tensors, max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    """Multiplies the gradients, in place, by max_norm / (total_norm + 1e-6) where that is below 1.

    As torch.nn.utils.clip_grads_with_norm_, with its bits.

    Args:
        parameters: tensors, or one tensor, whose ``grad`` is clipped; those without are skipped.
        max_norm: the largest norm, a number >= 0.
        total_norm: what ``get_total_norm`` returned for the gradients.
        foreach: as in torch; chooses nothing here. Default None.

    >>> import torch, fastopt
    >>> x = torch.nn.Parameter(torch.zeros(2))
    >>> x.grad = torch.tensor([3.0, 4.0])
    >>> fastopt.clip_grads_with_norm_(x, max_norm=1.0, total_norm=torch.tensor(5.0))
    >>> x.grad
    tensor([0.6000, 0.8000])
    """
    if type(parameters) is not list and not isinstance(parameters, Tensor):
        parameters = list(parameters)
    if is_dynamo_compiling() or _C is None:
        return _torch_clip_grads_with_norm(parameters, max_norm, total_norm, foreach)
    answer: Any
    if type(total_norm) is not Tensor:
        grads, norm = _dtensor_grads(parameters, 2.0), clip_dtensors.replicated(total_norm)
        if grads and norm is not None:
            return clip_dtensors.scale_(grads, coefficient(max_norm, norm))
        answer = _C.LeftToTorch(("the norm is a tensor subclass",))
    elif total_norm.device.type == _C.gpu_type():
        answer = on_gpu(_C.scale_grads_(parameters, float(max_norm), total_norm), "scale", total_norm)
    elif total_norm.device.type == "cpu" and total_norm.dtype != torch.float64:
        answer = _C.scale_grads_(parameters, coefficient(max_norm, total_norm), None)
    else:
        answer = _C.LeftToTorch(("the norm is float64, or on a device other than CPU and GPU",))
    if answer:
        left_to_torch(_torch_clip_grads_with_norm, answer, parameters, max_norm, total_norm, foreach)


def clip_grad_value_(parameters: Tensors, clip_value: float, foreach: bool | None = None) -> None:
    """Clamps the gradients of all parameters, in place, to [-clip_value, clip_value].

    As torch.nn.utils.clip_grad_value_, with its bits. NaN stays NaN.

    Args:
        parameters: tensors, or one tensor, whose ``grad`` is clipped; those without are skipped.
        clip_value: the largest magnitude, a number >= 0.
        foreach: as in torch; chooses nothing here. Default None.

    >>> import torch, fastopt
    >>> x = torch.nn.Parameter(torch.zeros(2))
    >>> x.grad = torch.tensor([0.5, -4.0])
    >>> fastopt.clip_grad_value_(x, clip_value=1.0)
    >>> x.grad
    tensor([ 0.5000, -1.0000])
    """
    if is_dynamo_compiling() or _C is None:
        _torch_clip_grad_value(parameters, clip_value, foreach)
        return
    if type(parameters) is not list and not isinstance(parameters, Tensor):
        parameters = list(parameters)
    answer = _C.clip_grad_value_(parameters, clip_value)
    if answer and (answer := on_gpu(answer, "clamp")):
        left_to_torch(_torch_clip_grad_value, answer, parameters, clip_value, foreach)


def coefficient(max_norm: float, total_norm: Tensor) -> float:
    """As torch computes it, on tensors without dimensions."""
    return float(torch.clamp(float(max_norm) / (total_norm.detach() + 1e-6), max=1.0))


def _dtensors(tensors: Any, norm_type: float) -> list[Any] | None:
    if float(norm_type) not in (1.0, 2.0, math.inf):
        return None
    return clip_dtensors.dtensors_of_one_mesh([tensors] if isinstance(tensors, Tensor) else tensors)


def _dtensor_grads(parameters: Any, norm_type: float) -> list[Any] | None:
    listed = [parameters] if isinstance(parameters, Tensor) else parameters
    return _dtensors([param.grad for param in listed if param.grad is not None], norm_type)


def _listed(parameters: Iterable[Tensor]) -> list[Tensor]:
    listed = list(parameters)
    if not listed and isinstance(parameters, types.GeneratorType):
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    return listed


_torch_clip_grad_norm: Callable[..., Tensor] = torch_clip_grad.clip_grad_norm_
_torch_get_total_norm: Callable[..., Tensor] = torch.nn.utils.get_total_norm
_torch_clip_grads_with_norm: Callable[..., None] = torch.nn.utils.clip_grads_with_norm_
_torch_clip_grad_value: Callable[..., Any] = torch_clip_grad.clip_grad_value_
