"""Adagrad in Triton: the update of a block of values, and the scalars of a step for a captured graph.

Names, statements and their order are those of csrc/step/algorithms.h; docs/numerics.md gives the reasons.
"""

import triton
import triton.language as tl

from .arithmetic import div, neg, sqrt

SLOTS = ("sum",)
HYPERS = ("lr", "lr_decay", "weight_decay", "eps", "maximize")
SCALARS = ("sign", "weight_decay", "eps", "neg_clr")


@triton.jit
def update(param, grad, state, h, USED: tl.constexpr):
    sum = state[0]
    sign, weight_decay, eps, neg_clr = h
    grad = sign * grad
    if weight_decay != 0:
        grad = tl.fma(weight_decay, param, grad)
    sum = tl.fma(grad, grad, sum)
    denom = sqrt(sum) + eps
    param = param + div(neg_clr * grad, denom)
    return param, (sum,)


@triton.jit
def scalars(hypers, step, T: tl.constexpr):
    lr, lr_decay, weight_decay, eps, maximize = hypers
    clr = lr / (1 + (step - 1) * lr_decay)
    return (tl.where(maximize != 0, -1.0, 1.0),
            weight_decay,
            eps,
            neg(clr))
