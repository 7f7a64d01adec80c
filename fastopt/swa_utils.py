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

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim import swa_utils as torch_swa_utils

from .averages import EMA, all_params, has_begun
from .backends import _C, count_left_to_torch, left_to_torch, on_gpu

__all__ = [*torch_swa_utils.__all__, "averaged_copy", "averaged_parameters"]
_torch: Any = torch_swa_utils  # which has no types
TorchUpdate = Callable[[list[Tensor], list[Tensor], Tensor | int], None]


def __getattr__(name: str) -> Any:
    return getattr(torch_swa_utils, name)


def _known(torch_update: Any, number: Callable[[Any], Any], is_count: bool = False) -> Any:
    """The function of torch's, but one pass; ``number(num_averaged)`` is the weight of the values, or their count."""

    def take_in(averages: Any, values: Any, num_averaged: Tensor | int) -> Any:
        """What the extension answers: something true if it did not."""
        answer = _C.average_(averages, values, float(number(num_averaged)), is_count)
        return answer and on_gpu(answer, "average")

    @functools.wraps(torch_update)
    def update(*args: Any, **kwargs: Any) -> None:
        if is_dynamo_compiling() or _C is None or len(args) != 3 or kwargs:
            torch_update(*args, **kwargs)
        elif answer := take_in(*args):
            left_to_torch(torch_update, answer, *args)

    update._take_in = take_in  # type: ignore[attr-defined]
    return update


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
    update: TorchUpdate = _known(_torch.get_ema_multi_avg_fn(decay), lambda num_averaged: 1 - decay)
    return update


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
    update: TorchUpdate = _known(_torch.get_swa_multi_avg_fn(), lambda num_averaged: 1 / (num_averaged + 1))
    return update


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
        take_in = getattr(update, "_take_in", None)
        if take_in is not None and int(self.n_averaged) > 0 and _took_in(take_in, self, model):
            self.n_averaged.add_(1)
        else:
            super().update_parameters(model)


# What AveragedModel does unless told otherwise; on CPU other bits than get_swa_multi_avg_fn.
_MEAN = _known(_torch.get_swa_multi_avg_fn(), lambda num_averaged: num_averaged + 1, is_count=True)


@torch.no_grad()
def _took_in(take_in: Callable[..., Any], averaged: AveragedModel, model: Module) -> bool:
    """Updates all averages; or none, and torch's own code shall do it."""
    if is_dynamo_compiling() or _C is None:
        return False
    own_buffers, buffers = list(averaged.module.buffers()), list(model.buffers())
    averages, values = list(averaged.parameters()), list(model.parameters())
    if averaged.use_buffers:
        averages, values = [*averaged.module.parameters(), *own_buffers], [*values, *buffers]  # type: ignore[list-item]
        if not all(tensor.is_floating_point() for tensor in own_buffers):
            return False  # torch averages each dtype in its own way
    if len(averages) != len(values):
        return False
    if answer := take_in(averages, values, averaged.n_averaged):
        count_left_to_torch("AveragedModel", answer)
        return False
    if not averaged.use_buffers:
        if own_buffers:
            torch._foreach_copy_(own_buffers, buffers)
    return True


# ---- averages that an optimizer made with ``ema_decay`` keeps


@contextlib.contextmanager
def averaged_parameters(*optimizers: Optimizer) -> Iterator[None]:
    """Within the context, the parameters have the values of their running averages: for an evaluation.

    Afterwards they have their own again, bit for bit: a step inside is lost. Parameters without an average, which were
    never stepped, keep their values.

    Args:
        optimizers: those that have the averages, made with ``ema_decay``.

    Raises:
        ValueError: none of them has an average.

    >>> import torch, fastopt
    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = fastopt.SGD([weight], lr=1.0, ema_decay=0.75)
    >>> for _ in range(2):
    ...     weight.grad = torch.tensor([1.0])
    ...     optimizer.step()
    >>> with fastopt.swa_utils.averaged_parameters(optimizer):
    ...     print(weight.item())
    -1.25
    >>> weight.item()
    -2.0
    """
    averages = _averages(optimizers)
    own = [param.detach().clone() for param in averages]
    try:
        with torch.no_grad():
            for param, average in averages.items():
                param.copy_(average)
        yield
    finally:
        with torch.no_grad():
            for param, values in zip(averages, own, strict=True):
                param.copy_(values)


def averaged_copy(model: Module, *optimizers: Optimizer) -> Module:
    """A deep copy of a model, whose parameters have the values of their running averages: to save or to serve.

    Args:
        model: whose parameters the optimizers step.
        optimizers: those that have the averages, made with ``ema_decay``.

    Returns:
        A model of its own; buffers are copied.

    Raises:
        ValueError: none of the optimizers has an average.

    >>> import torch, fastopt
    >>> model = torch.nn.Linear(1, 1)
    >>> optimizer = fastopt.Adam(model.parameters(), ema_decay=0.999)
    >>> model(torch.ones(1)).backward()
    >>> optimizer.step()
    >>> smooth = fastopt.swa_utils.averaged_copy(model, optimizer)
    >>> torch.equal(smooth.weight, model.weight)  # the first average is a copy
    True
    """
    averages = _averages(optimizers)
    if not any(param in averages for param in model.parameters()):
        raise ValueError("no parameter of this model has a running average: give the optimizer that steps them")
    made = copy.deepcopy(model)
    with torch.no_grad():
        for param, own in zip(model.parameters(), made.parameters(), strict=True):
            if param in averages:
                own.copy_(averages[param])
    return made


def _averages(optimizers: tuple[Optimizer, ...]) -> dict[Tensor, Tensor]:
    states = [(param, optimizer.state.get(param, {})) for optimizer in optimizers for param in all_params(optimizer)]
    averages = {param: entry[EMA] for param, entry in states if has_begun(entry)}
    for param, average in averages.items():
        if average.shape != param.shape:
            shapes = f"shape {list(average.shape)}, the parameter {list(param.shape)}"
            raise ValueError(f"a running average has {shapes}: load them together, or delete state[param]['ema']")
    if not averages:
        raise ValueError("no optimizer has running averages: make it with ema_decay, and step once")
    return averages
