"""RMSprop: the class and its state. The update is in csrc/step/algorithms.h and kernels/rmsprop.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .algorithm import Algorithm, Group, same_dtype
from .optimizer import FusedStep, drop_in


class _Algorithm(Algorithm):
    update = "rmsprop"

    def slots(self, optimizer: Optimizer, group: Group) -> dict[str, float]:
        names = ["square_avg"] + ["momentum_buffer"] * (group["momentum"] > 0) + ["grad_avg"] * bool(group["centered"])
        return dict.fromkeys(names, 0.0)

    def refusal(self, optimizer: Optimizer, group: Group, param: Tensor) -> Exception | None:
        error = super().refusal(optimizer, group, param)
        return error or (same_dtype(optimizer, param, "grad_avg") if group["centered"] else None)


@drop_in
class RMSprop(FusedStep, torch.optim.RMSprop):
    """RMSprop: divides the gradient by the root of a running mean of its squares.

    At each step of a parameter p with gradient g, all elementwise::

        g = -g                                            if maximize
        g = g + weight_decay * p
        s = alpha * s + (1 - alpha) * g * g               from 0
        a = alpha * a + (1 - alpha) * g                   from 0, if centered; u = s - a * a, else u = s
        d = g / (sqrt(u) + eps)
        b = momentum * b + d                              from 0, if momentum; p = p - lr * b, else p = p - lr * d

    State: ``step``, ``square_avg`` (s), ``grad_avg`` (a) if centered, ``momentum_buffer`` (b) if momentum > 0; all but
    step are shaped as the parameter.

    Tieleman and Hinton, Lecture 6.5 of Neural Networks for Machine Learning, Coursera 2012; centered: Graves,
    Generating Sequences With Recurrent Neural Networks, arXiv:1308.0850. As in torch.optim, eps is added to the root,
    not under it.

    Args:
        params: tensors to step, (name, tensor) pairs, or dicts with "params" and options of their own (param groups).
        lr: learning rate, a number >= 0 or a tensor with one element. Default 1e-2.
        alpha: how much of the running means is kept at a step, a number >= 0; below 1 to be a mean. Default 0.99.
        eps: added to the root, a number >= 0. Default 1e-8.
        weight_decay: L2 penalty, added to the gradient; a number >= 0. Default 0.
        momentum: how much of the buffer is kept at a step, a number >= 0. Default 0.
        centered: divide by the standard deviation instead. Default False.
        capturable: True reads all that may change on the GPU, for CUDA graph capture. Default False.
        foreach: as in torch.optim; the fused step runs whatever it says. Default None.
        maximize: ascend instead of descend. Default False.
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

    Differs from torch.optim.RMSprop: square roots are correctly rounded; bfloat16 and float16 parameters are stepped in
    float32 and rounded once; loaded state keeps its dtype (not float64); ``foreach`` chooses nothing.

    Raises:
        ValueError: an argument is out of range, or ``params`` is empty.
        TypeError: ``params`` is no iterable of tensors or dicts.

    >>> import torch, fastopt
    >>> x = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = fastopt.RMSprop([x], lr=0.1)
    >>> (x**2).sum().backward()
    >>> optimizer.step()
    >>> x.detach()
    tensor([2.0000, 3.0000])
    """

    _fastopt = _Algorithm()
