"""SGD with momentum: the class and its state. The update is in csrc/step/algorithms.h and kernels/sgd.py."""

from __future__ import annotations

import torch
from torch.optim.optimizer import Optimizer

from .algorithm import Algorithm, Group
from .optimizer import FusedStep, drop_in


class _Algorithm(Algorithm):
    update = "sgd"
    has_step = False
    takes_sparse = True

    def slots(self, optimizer: Optimizer, group: Group) -> dict[str, float]:
        # The first step adds the gradient to it, with its sign of zero.
        return {"momentum_buffer": -0.0} if group["momentum"] != 0 else {}


@drop_in
class SGD(FusedStep, torch.optim.SGD):
    """Stochastic gradient descent, with momentum (heavy ball or Nesterov's).

    At each step of a parameter p with gradient g, all elementwise::

        g = -g                                            if maximize
        g = g + weight_decay * p
        b = momentum * b + (1 - dampening) * g            if momentum; the first step has b = g
        g = g + momentum * b if nesterov else b           if momentum
        p = p - lr * g

    State: ``momentum_buffer`` (b), shaped as the parameter, if momentum is not 0.

    Sutskever, Martens, Dahl and Hinton, On the importance of initialization and momentum in deep learning, ICML 2013.
    As in torch.optim, lr multiplies what comes out of the buffer, not what enters it.

    Args:
        params: tensors to step, (name, tensor) pairs, or dicts with "params" and options of their own (param groups).
        lr: learning rate, a number >= 0 or a tensor with one element. Default 1e-3.
        momentum: how much of the buffer is kept at a step, a number >= 0; below 1 to converge. Default 0.
        dampening: how much of the gradient does not enter the buffer. Default 0.
        weight_decay: L2 penalty, added to the gradient; a number >= 0 or a tensor with one element. Default 0.
        nesterov: Nesterov's momentum, which needs momentum > 0 and dampening = 0. Default False.
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

    Differs from torch.optim.SGD: bfloat16 and float16 parameters are stepped in float32 and rounded once;
    loaded state keeps its dtype (not float64); ``foreach`` and ``fused`` choose nothing.

    Raises:
        ValueError: an argument is out of range, nesterov has no momentum, or ``params`` is empty.
        TypeError: ``params`` is no iterable of tensors or dicts.
        RuntimeError: ``fused`` and ``foreach``, or ``fused`` and ``differentiable``, are both True.

    >>> import torch, fastopt
    >>> x = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = fastopt.SGD([x], lr=0.1)
    >>> (x**2).sum().backward()
    >>> optimizer.step()
    >>> x.detach()
    tensor([2.4000, 3.2000])
    """

    _fastopt = _Algorithm()
