"""Adam and AdamW: the classes and their state. The update is in csrc/step/algorithms.h and kernels/adam.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .algorithm import Algorithm, Group, same_dtype
from .optimizer import FusedStep, drop_in


class _Algorithm(Algorithm):
    update = "adam"

    def slots(self, optimizer: Optimizer, group: Group) -> dict[str, float]:
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(group["amsgrad"])
        return dict.fromkeys(names, 0.0)

    def refusal(self, optimizer: Optimizer, group: Group, param: Tensor) -> Exception | None:
        if param.grad is not None and param.grad.is_sparse:
            return RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
        return super().refusal(optimizer, group, param) or same_dtype(optimizer, param, "exp_avg")


@drop_in
class Adam(FusedStep, torch.optim.Adam):
    """Adam: steps along a running mean of the gradients, divided by the root of a running mean of their squares.

    At step t = 1, 2, ... of a parameter p with gradient g, all elementwise::

        g = -g                                            if maximize
        g = g + weight_decay * p                          or, with decoupled_weight_decay, p = p - lr * weight_decay * p
        m = beta1 * m + (1 - beta1) * g                   from 0
        v = beta2 * v + (1 - beta2) * g * g               from 0
        u = max(u, v) if amsgrad else v                   from 0
        p = p - lr / (1 - beta1**t) * m / (sqrt(u) / sqrt(1 - beta2**t) + eps)

    State: ``step`` (t), ``exp_avg`` (m), ``exp_avg_sq`` (v) and, with amsgrad, ``max_exp_avg_sq`` (u); all but step are
    shaped as the parameter.

    Kingma and Ba, Adam: A Method for Stochastic Optimization, arXiv:1412.6980; amsgrad: Reddi, Kale and Kumar,
    On the Convergence of Adam and Beyond, arXiv:1904.09237.

    Args:
        params: tensors to step, (name, tensor) pairs, or dicts with "params" and options of their own (param groups).
        lr: learning rate, a number >= 0 or a tensor with one element. Default 1e-3.
        betas: how much of m and of v is kept at a step, each in [0, 1); two floats, or two tensors with one element.
            Default (0.9, 0.999).
        eps: added to the root, a number >= 0. Default 1e-8.
        weight_decay: L2 penalty, added to the gradient; a number >= 0. Default 0.
        amsgrad: divide by the largest v so far. Default False.
        maximize: ascend instead of descend. Default False.
        foreach, fused: as in torch.optim; the fused step runs whatever they say. Default None.
        capturable: True reads all that may change on the GPU, for CUDA graph capture. Default False.
        differentiable: True lets autograd pass through the step and leaves it to torch. Default False.
        decoupled_weight_decay: shrink the parameter instead of changing the gradient, which is AdamW. Default False.
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

    Differs from torch.optim.Adam: square roots are correctly rounded; bfloat16 and float16 parameters are stepped in
    float32 and rounded once; loaded state keeps its dtype (not float64); ``foreach`` and ``fused`` choose nothing.

    Raises:
        ValueError: an argument is out of range, or ``params`` is empty.
        TypeError: ``params`` is no iterable of tensors or dicts.
        RuntimeError: ``fused`` and ``foreach``, or ``fused`` and ``differentiable``, are both True.

    >>> import torch, fastopt
    >>> x = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = fastopt.Adam([x], lr=1.0)
    >>> (x**2).sum().backward()
    >>> optimizer.step()
    >>> x.detach()
    tensor([2., 3.])
    """

    _fastopt = _Algorithm()


@drop_in
class AdamW(Adam, torch.optim.AdamW):
    """AdamW: Adam with weight decay that shrinks the parameter and does not pass through the running means.

    At step t = 1, 2, ... of a parameter p with gradient g, all elementwise::

        g = -g                                            if maximize
        p = p - lr * weight_decay * p
        m = beta1 * m + (1 - beta1) * g                   from 0
        v = beta2 * v + (1 - beta2) * g * g               from 0
        u = max(u, v) if amsgrad else v                   from 0
        p = p - lr / (1 - beta1**t) * m / (sqrt(u) / sqrt(1 - beta2**t) + eps)

    State: ``step`` (t), ``exp_avg`` (m), ``exp_avg_sq`` (v) and, with amsgrad, ``max_exp_avg_sq`` (u); all but step are
    shaped as the parameter.

    Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv:1711.05101; amsgrad: Reddi, Kale and Kumar,
    On the Convergence of Adam and Beyond, arXiv:1904.09237.

    Args:
        params: tensors to step, (name, tensor) pairs, or dicts with "params" and options of their own (param groups).
        lr: learning rate, a number >= 0 or a tensor with one element. Default 1e-3.
        betas: how much of m and of v is kept at a step, each in [0, 1); two floats, or two tensors with one element.
            Default (0.9, 0.999).
        eps: added to the root, a number >= 0. Default 1e-8.
        weight_decay: the parameter shrinks by lr * weight_decay of itself; a number >= 0. Default 1e-2.
        amsgrad: divide by the largest v so far. Default False.
        maximize: ascend instead of descend. Default False.
        foreach, fused: as in torch.optim; the fused step runs whatever they say. Default None.
        capturable: True reads all that may change on the GPU, for CUDA graph capture. Default False.
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

    Differs from torch.optim.AdamW: square roots are correctly rounded; bfloat16 and float16 parameters are stepped in
    float32 and rounded once; loaded state keeps its dtype (not float64); ``foreach`` and ``fused`` choose nothing.

    Raises:
        ValueError: an argument is out of range, or ``params`` is empty.
        TypeError: ``params`` is no iterable of tensors or dicts.
        RuntimeError: ``fused`` and ``foreach``, or ``fused`` and ``differentiable``, are both True.

    >>> import torch, fastopt
    >>> x = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = fastopt.AdamW([x], lr=1.0)
    >>> (x**2).sum().backward()
    >>> optimizer.step()
    >>> x.detach()
    tensor([1.9700, 2.9600])
    """
