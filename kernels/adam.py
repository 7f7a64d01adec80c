"""Adam and AdamW in Triton: the update of a block of values, and the scalars of a step for a captured graph.

Names, statements and their order are those of csrc/step/algorithms.h; docs/numerics.md gives the reasons.
"""

import triton
import triton.language as tl

from .arithmetic import div, divide_root, divisor, lerp_from_end, lerp_weight, maximum, neg, power, sqrt

SLOTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
HYPERS = ("lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")
SCALARS = ("sign", "weight_decay", "decay", "lerp_weight", "lerp_from_grad",
           "beta2", "one_minus_beta2", "bias_correction2_sqrt", "bias_correction2_sqrt_reciprocal",
           "bias_correction2_sqrt_rest", "eps", "neg_step_size")


@triton.jit
def update(param, grad, state, h, USED: tl.constexpr):
    exp_avg, exp_avg_sq, max_exp_avg_sq = state
    (sign, weight_decay, decay, lerp_weight, lerp_from_grad,
     beta2, one_minus_beta2, bias_correction2_sqrt, reciprocal, rest, eps, neg_step_size) = h
    grad = sign * grad
    if weight_decay != 0:
        grad = tl.fma(weight_decay, param, grad)
    param = param * decay
    exp_avg = tl.fma(lerp_weight, grad - exp_avg, tl.where(lerp_from_grad != 0, grad, exp_avg))
    exp_avg_sq = tl.fma(one_minus_beta2 * grad, grad, exp_avg_sq * beta2)
    u = exp_avg_sq
    if USED & 0b100:  # amsgrad
        max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
        u = max_exp_avg_sq
    denom = divide_root(sqrt(u), bias_correction2_sqrt, reciprocal, rest) + eps
    param = param + div(neg_step_size * exp_avg, denom)
    return param, (exp_avg, exp_avg_sq, max_exp_avg_sq)


@triton.jit
def scalars(hypers, step, T: tl.constexpr):
    lr, beta1, beta2, eps, weight_decay, _, maximize, decoupled = hypers
    bias_correction1 = 1 - power(beta1, step)
    bias_correction2 = 1 - power(beta2, step)
    step_size = lr / bias_correction1
    one_minus_beta1 = (1 - beta1).to(T)
    bias_correction2_sqrt, reciprocal, rest = divisor(tl.sqrt(bias_correction2), T)
    return (tl.where(maximize != 0, -1.0, 1.0),
            tl.where(decoupled != 0, 0.0, weight_decay),
            tl.where((decoupled != 0) & (weight_decay != 0), 1 - lr * weight_decay, 1.0),
            lerp_weight(one_minus_beta1),
            lerp_from_end(one_minus_beta1),
            beta2,
            1 - beta2,
            bias_correction2_sqrt,
            reciprocal,
            rest,
            eps,
            neg(step_size))
