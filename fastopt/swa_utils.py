"""Averages of a model's parameters, as torch.optim.swa_utils makes them: one pass over all tensors.

What torch's module has and this one does not change is torch's own object.

>>> import torch, fastopt
>>> model = torch.nn.Linear(2, 1)
>>> average = fastopt.swa_utils.AveragedModel(
...     model, multi_avg_fn=fastopt.swa_utils.get_ema_multi_avg_fn(0.9)
... )
>>> average.update_parameters(model)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Module
from torch.optim import swa_utils as torch_swa_utils

from .backends import _C, count_left_to_torch, left_to_torch

__all__ = list(torch_swa_utils.__all__)
_torch: Any = torch_swa_utils  # which has no types
TorchUpdate = Callable[[list[Tensor], list[Tensor], Tensor | int], None]


def __getattr__(name: str) -> Any:
    return getattr(torch_swa_utils, name)


class _Update:
    """An update of averages that we know: ``number(num_averaged)`` is the weight of the values, or their count."""

    def __init__(self, torch_update: TorchUpdate, number: Callable[[Any], Any], is_count: bool = False):
        self.torch_update, self.number, self.is_count = torch_update, number, is_count

    def __call__(self, averages: list[Tensor], values: list[Tensor], num_averaged: Tensor | int) -> None:
        if is_dynamo_compiling() or _C is None:
            return self.torch_update(averages, values, num_averaged)
        if answer := _C.average_(averages, values, float(self.number(num_averaged)), self.is_count):
            left_to_torch(self.torch_update, answer, averages, values, num_averaged)


def get_ema_multi_avg_fn(decay: float = 0.999) -> TorchUpdate:
    """A function that updates exponential moving averages: average = decay * average + (1 - decay) * value.

    As torch.optim.swa_utils.get_ema_multi_avg_fn, with its bits.

    Args:
        decay: how much of the average is kept, in [0, 1]. Default 0.999.

    Returns:
        ``f(averages, values, num_averaged)`` for two lists of tensors, the first of which it changes.

    Raises:
        ValueError: ``decay`` is out of range.

    >>> import torch, fastopt
    >>> average, value = torch.tensor([0.0]), torch.tensor([1.0])
    >>> fastopt.swa_utils.get_ema_multi_avg_fn(0.75)([average], [value], 1)
    >>> average
    tensor([0.2500])
    """
    return _Update(_torch.get_ema_multi_avg_fn(decay), lambda num_averaged: 1 - decay)


def get_swa_multi_avg_fn() -> TorchUpdate:
    """A function that updates equally weighted averages: average + (value - average) / (num_averaged + 1).

    As torch.optim.swa_utils.get_swa_multi_avg_fn, with its bits.

    Returns:
        ``f(averages, values, num_averaged)`` for two lists of tensors, the first of which it changes.

    >>> import torch, fastopt
    >>> average, value = torch.tensor([0.0]), torch.tensor([1.0])
    >>> fastopt.swa_utils.get_swa_multi_avg_fn()([average], [value], 3)
    >>> average
    tensor([0.2500])
    """
    return _Update(_torch.get_swa_multi_avg_fn(), lambda num_averaged: 1 / (num_averaged + 1))


class AveragedModel(torch_swa_utils.AveragedModel):
    """A copy of a model whose parameters are running averages of the model's.

    torch.optim.swa_utils.AveragedModel with an ``update_parameters`` that makes one pass over all parameters. All else,
    the state_dict included, is torch's.

    Args:
        model: the model to average.
        device: where the averages are. Default None: where the model is.
        avg_fn: ``f(average, value, num_averaged)`` for one tensor, which returns the new average; torch's own code runs
            it. Default None.
        multi_avg_fn: ``f(averages, values, num_averaged)`` for lists of tensors. Default None: the equally weighted
            average, unless there is an ``avg_fn``.
        use_buffers: average the buffers too. Default False: they are copied.

    Raises:
        AssertionError: both ``avg_fn`` and ``multi_avg_fn`` were given.

    >>> import torch, fastopt
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> average = fastopt.swa_utils.AveragedModel(model)
    >>> for value in (1.0, 2.0):
    ...     _ = model.weight.data.fill_(value)
    ...     average.update_parameters(model)
    >>> average.module.weight.data
    tensor([[1.5000]])
    """

    def update_parameters(self, model: Module) -> None:
        """Takes the present parameters of ``model`` into the averages; the first time, copies them."""
        update = _MEAN if self.multi_avg_fn is None and self.avg_fn is None else self.multi_avg_fn
        if isinstance(update, _Update) and int(self.n_averaged) > 0 and _updated(update, self, model):
            self.n_averaged.add_(1)
        else:
            super().update_parameters(model)


# What AveragedModel does on CPU unless told otherwise; other bits than get_swa_multi_avg_fn.
_MEAN = _Update(_torch.get_swa_multi_avg_fn(), lambda num_averaged: num_averaged + 1, is_count=True)


@torch.no_grad()
def _updated(update: _Update, averaged: AveragedModel, model: Module) -> bool:
    """Updates all averages; or none, and torch's own code shall do it."""
    if is_dynamo_compiling() or _C is None:
        return False
    averages: list[Tensor] = list(averaged.module.parameters())
    values: list[Tensor] = list(model.parameters())
    own_buffers, buffers = list(averaged.module.buffers()), list(model.buffers())
    rest: list[tuple[Tensor, Tensor]] = []  # buffers that are no floating numbers
    if averaged.use_buffers:
        for own, other in zip(own_buffers, buffers, strict=True):
            if own.is_floating_point():
                averages.append(own)
                values.append(other)
            else:
                rest.append((own, other))
        if rest and update is _MEAN:
            return False
    if answer := _C.average_(averages, values, float(update.number(averaged.n_averaged)), update.is_count):
        count_left_to_torch("AveragedModel", answer)
        return False
    if rest:
        update.torch_update([own for own, _ in rest], [other for _, other in rest], averaged.n_averaged)
    if not averaged.use_buffers:
        if own_buffers:
            torch._foreach_copy_(own_buffers, buffers)
    return True
