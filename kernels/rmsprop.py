"""RMSprop in Triton: the update of a block of values, and the scalars of a step for a captured graph.

Names, statements and their order are those of csrc/step/algorithms.h; docs/numerics.md gives the reasons.
"""

import triton
import triton.language as tl

from .arithmetic import div, lerp_from_end, lerp_weight, neg, sqrt

SLOTS = ("square_avg", "momentum_buffer", "grad_avg")
HYPERS = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize")
SCALARS = ("sign", "weight_decay", "alpha", "one_minus_alpha",
           "lerp_weight", "lerp_from_grad", "eps", "momentum", "neg_lr")


@triton.jit
def update(param, grad, state, h, USED: tl.constexpr):
    square_avg, momentum_buffer, grad_avg = state
    sign, weight_decay, alpha, one_minus_alpha, lerp_weight, lerp_from_grad, eps, momentum, neg_lr = h
    grad = sign * grad
    if weight_decay != 0:
        grad = tl.fma(weight_decay, param, grad)
    square_avg = tl.fma(one_minus_alpha * grad, grad, square_avg * alpha)
    u = square_avg
    if USED & 0b100:  # centered
        grad_avg = tl.fma(lerp_weight, grad - grad_avg, tl.where(lerp_from_grad != 0, grad, grad_avg))
        u = tl.fma(neg(grad_avg), grad_avg, square_avg)
    denom = sqrt(u) + eps
    if USED & 0b010:  # momentum
        momentum_buffer = momentum_buffer * momentum + div(grad, denom)
        param = tl.fma(neg_lr, momentum_buffer, param)
    else:
        param = param + div(neg_lr * grad, denom)
    return param, (square_avg, momentum_buffer, grad_avg)


@triton.jit
def scalars(hypers, step, T: tl.constexpr):
    lr, alpha, eps, weight_decay, momentum, _, maximize = hypers
    one_minus_alpha = (1 - alpha).to(T)
    return (tl.where(maximize != 0, -1.0, 1.0),
            weight_decay,
            alpha,
            one_minus_alpha,
            lerp_weight(one_minus_alpha),
            lerp_from_end(one_minus_alpha),
            eps,
            momentum,
            neg(lr))
