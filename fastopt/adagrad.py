"""Adagrad: the class and its state. The update is in csrc/step/algorithms.h and kernels/adagrad.py."""

from __future__ import annotations

import torch
from torch.optim.optimizer import Optimizer

from .algorithm import Algorithm, Group
from .optimizer import FusedStep, drop_in


class _Algorithm(Algorithm):
    update = "adagrad"
    takes_sparse = True

    def slots(self, optimizer: Optimizer, group: Group) -> dict[str, float]:
        return {"sum": optimizer.defaults["initial_accumulator_value"]}

    def before_torchs_step(self, optimizer: Optimizer) -> None:
        """Makes state: torch 2.10 does it in the constructor only, and its step would fail half-way without."""
        initial = optimizer.defaults["initial_accumulator_value"]
        for group in optimizer.param_groups:
            options = {name: group[name] for name in ("fused", "differentiable")}
            for param in group["params"]:
                if param.grad is not None and not optimizer.state[param]:
                    one = torch.optim.Adagrad([param], initial_accumulator_value=initial, **options)
                    optimizer.state[param] = one.state[param]


@drop_in
class Adagrad(FusedStep, torch.optim.Adagrad):
    """Adagrad: each element's learning rate shrinks with the root of the sum of its squared gradients.

    At step t = 1, 2, ... of a parameter p with gradient g, all elementwise::

        g = -g                                            if maximize
        g = g + weight_decay * p
        s = s + g * g                                     from initial_accumulator_value
        p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)

    State, made by the constructor: ``step`` (t) and ``sum`` (s), shaped as the parameter; and what options add to it,
    averages as NaN until the first step.

    Duchi, Hazan and Singer, Adaptive Subgradient Methods for Online Learning and Stochastic Optimization, JMLR 2011.

    Args:
        params: tensors to step, (name, tensor) pairs, or dicts with "params" and options of their own (param groups).
        lr: learning rate, a number >= 0 or a tensor with one element. Default 1e-2.
        lr_decay: how fast lr falls with the number of steps, a number >= 0. Default 0.
        weight_decay: L2 penalty, added to the gradient; a number >= 0. Default 0.
        initial_accumulator_value: where the sum starts, a number >= 0. Default 0.
        eps: added to the root, a number >= 0. Default 1e-10.
        maximize: ascend instead of descend. Default False.
        foreach, fused: as in torch.optim; the fused step runs whatever they say. Default None.
        differentiable: True lets autograd pass through the step and leaves it to torch. Default False.
        max_grad_norm: clips the norm of all gradients together to this number, > 0, inside the step. ``.grad`` stays
            as it is. May be changed between steps. Default None: no clipping.
        error_if_nonfinite: refuse a step that clips and whose norm is NaN or infinite. Default False.
        ema_decay: keep a running average of every parameter, ``state[param]["ema"]``, updated inside the step: how much
            of it is kept, in [0, 1]. May be changed between steps. Default None: no average.
        state_dtype: of state tensors that are made or loaded, torch.float32, bfloat16 or float16; not for float64 and
            complex parameters. None: the parameter's, and loaded state keeps its own. Default None.
        master_weights: step bfloat16 and float16 parameters as float32 ones: what their 16 bits lack is kept in the
            state, ``remainder`` (int16) of bfloat16 and ``master`` (float32) of float16. Default False.
        stochastic_rounding: round bfloat16 and float16 parameters up or down at random, with the probability of what is
            cut off; not with ``master_weights``. Default False.
        rounding_seed: of the random bits, an integer in [0, 2**64). A state that is loaded keeps its own. Default 0.

    Differs from torch.optim.Adagrad: square roots are correctly rounded; bfloat16 and float16 parameters are stepped in
    float32 and rounded once; loaded state keeps its dtype (not float64); ``foreach`` and ``fused`` choose nothing.

    Raises:
        ValueError: an argument is out of range, or ``params`` is empty.
        TypeError: ``params`` is no iterable of tensors or dicts.
        RuntimeError: ``fused`` and ``foreach``, or ``fused`` and ``differentiable``, are both True.

    >>> import torch, fastopt
    >>> x = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = fastopt.Adagrad([x], lr=1.0)
    >>> (x**2).sum().backward()
    >>> optimizer.step()
    >>> x.detach()
    tensor([2., 3.])
    """

    _fastopt = _Algorithm()
