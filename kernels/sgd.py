"""SGD in Triton: the update of a block of values, and the scalars of a step for a captured graph.

Names, statements and their order are those of csrc/step/algorithms.h; docs/numerics.md gives the reasons.
"""

import triton
import triton.language as tl

from .arithmetic import neg

SLOTS = ("momentum_buffer",)
HYPERS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
SCALARS = ("sign", "weight_decay", "momentum", "grad_weight", "nesterov", "neg_lr")


@triton.jit
def update(param, grad, state, h, USED: tl.constexpr):
    momentum_buffer = state[0]
    sign, weight_decay, momentum, grad_weight, nesterov, neg_lr = h
    grad = sign * grad
    if weight_decay != 0:
        grad = tl.fma(weight_decay, param, grad)
    if USED & 0b1:
        momentum_buffer = tl.fma(grad_weight, grad, momentum_buffer * momentum)
        grad = tl.where(nesterov != 0, tl.fma(momentum, momentum_buffer, grad), momentum_buffer)
    param = tl.fma(neg_lr, grad, param)
    return param, (momentum_buffer,)


@triton.jit
def scalars(hypers, step, T: tl.constexpr):
    lr, momentum, dampening, weight_decay, nesterov, maximize = hypers
    return (tl.where(maximize != 0, -1.0, 1.0),
            weight_decay,
            momentum,
            tl.where(step == 1, 1.0, 1 - dampening),  # the first step has no dampening; the buffer starts as -0.0
            tl.where(nesterov != 0, 1.0, 0.0),
            neg(lr))
