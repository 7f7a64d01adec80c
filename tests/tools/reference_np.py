"""The optimizers in numpy, written from docs/numerics.md and from nothing else: what the GPU kernels are compared with.

The functions in STEPS take hyper-parameters and work the whole sequence out by themselves, so that they share neither
code nor scalars with what they check. `scalars` is the host's part of a step: the run-time scalars of the kernels.
"""

import numpy as np

from tests.tools import ptx_ops

# The primitives of torch's CPU kernels; every + - * / and sqrt of numpy rounds once.


def fma(a, b, c):
    a, b, c = np.broadcast_arrays(a, b, c)
    return ptx_ops.fma32(a, b, c) if a.dtype == np.float32 else ptx_ops.fma64(a, b, c)


def add(a, b, alpha):
    return fma(alpha, b, a)


def addcmul(a, t1, t2, value):
    return fma(value * t1, t2, a)


def addcdiv(a, t1, t2, value):
    return a + (value * t1) / t2


def lerp(a, b, weight):
    return fma(weight, b - a, a) if abs(weight) < 0.5 else fma(weight - type(weight)(1), b - a, b)


# One step of each algorithm: hypers as in a param group, t the step count; returns param and state


def adam(hypers, t, param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq=None):
    T = param.dtype.type
    lr, beta1, beta2, eps, weight_decay = (hypers[key] for key in ("lr", "beta1", "beta2", "eps", "weight_decay"))
    bias_correction1 = 1 - beta1**t
    bias_correction2 = 1 - beta2**t
    step_size = lr / bias_correction1
    bias_correction2_sqrt = bias_correction2**0.5
    if hypers["maximize"]:
        grad = -grad
    if weight_decay != 0:
        if hypers["decoupled_weight_decay"]:
            param = param * T(1 - lr * weight_decay)
        else:
            grad = add(grad, param, T(weight_decay))
    exp_avg = lerp(exp_avg, grad, T(1 - beta1))
    exp_avg_sq = addcmul(exp_avg_sq * T(beta2), grad, grad, T(1 - beta2))
    if max_exp_avg_sq is None:
        denom = np.sqrt(exp_avg_sq) / T(bias_correction2_sqrt) + T(eps)
        return addcdiv(param, exp_avg, denom, T(-step_size)), exp_avg, exp_avg_sq
    max_exp_avg_sq = np.maximum(max_exp_avg_sq, exp_avg_sq)
    denom = np.sqrt(max_exp_avg_sq) / T(bias_correction2_sqrt) + T(eps)
    return addcdiv(param, exp_avg, denom, T(-step_size)), exp_avg, exp_avg_sq, max_exp_avg_sq


def sgd(hypers, t, param, grad, momentum_buffer=None):
    T = param.dtype.type
    if hypers["maximize"]:
        grad = -grad
    if hypers["weight_decay"] != 0:
        grad = add(grad, param, T(hypers["weight_decay"]))
    if momentum_buffer is None:
        return (add(param, grad, T(-hypers["lr"])),)
    if t == 1:
        momentum_buffer = grad
    else:
        momentum_buffer = add(momentum_buffer * T(hypers["momentum"]), grad, T(1 - hypers["dampening"]))
    grad = add(grad, momentum_buffer, T(hypers["momentum"])) if hypers["nesterov"] else momentum_buffer
    return add(param, grad, T(-hypers["lr"])), momentum_buffer


def rmsprop(hypers, t, param, grad, square_avg, momentum_buffer=None, grad_avg=None):
    T = param.dtype.type
    alpha = hypers["alpha"]
    if hypers["maximize"]:
        grad = -grad
    if hypers["weight_decay"] != 0:
        grad = add(grad, param, T(hypers["weight_decay"]))
    square_avg = u = addcmul(square_avg * T(alpha), grad, grad, T(1 - alpha))
    if grad_avg is not None:
        grad_avg = lerp(grad_avg, grad, T(1 - alpha))
        u = fma(-grad_avg, grad_avg, square_avg)
    denom = np.sqrt(u) + T(hypers["eps"])
    if momentum_buffer is not None:
        momentum_buffer = momentum_buffer * T(hypers["momentum"])
        momentum_buffer = momentum_buffer + grad / denom
        param = add(param, momentum_buffer, T(-hypers["lr"]))
    else:
        param = addcdiv(param, grad, denom, T(-hypers["lr"]))
    return tuple(x for x in (param, square_avg, momentum_buffer, grad_avg) if x is not None)


def adagrad(hypers, t, param, grad, sum):
    T = param.dtype.type
    clr = hypers["lr"] / (1 + (t - 1) * hypers["lr_decay"])
    if hypers["maximize"]:
        grad = -grad
    if hypers["weight_decay"] != 0:
        grad = add(grad, param, T(hypers["weight_decay"]))
    sum = fma(grad, grad, sum)
    denom = np.sqrt(sum) + T(hypers["eps"])
    return addcdiv(param, grad, denom, T(-clr)), sum


STEPS = {"sgd": sgd, "adagrad": adagrad, "rmsprop": rmsprop, "adam": adam}


def scalars(algorithm, hypers, t, T):
    """The scalars of one step by name, each worked out in double and rounded once to T."""
    maximize, weight_decay = hypers["maximize"], hypers["weight_decay"]
    values = {"sign": -1 if maximize else 1, "weight_decay": weight_decay}
    if algorithm in ("sgd", "rmsprop"):
        values |= {"momentum": hypers["momentum"], "neg_lr": -hypers["lr"]}
    if algorithm == "sgd":
        values |= {"grad_weight": 1 if t == 1 else 1 - hypers["dampening"], "nesterov": int(hypers["nesterov"])}
    else:
        values["eps"] = hypers["eps"]
    if algorithm == "adagrad":
        values["neg_clr"] = -(hypers["lr"] / (1 + (t - 1) * hypers["lr_decay"]))
    if algorithm == "rmsprop":
        values |= {"alpha": hypers["alpha"], "one_minus_alpha": 1 - hypers["alpha"]}
        values |= _lerp(T(1 - hypers["alpha"]))
    if algorithm == "adam":
        decoupled = hypers["decoupled_weight_decay"]
        values["weight_decay"] = 0 if decoupled else weight_decay
        values["decay"] = 1 - hypers["lr"] * weight_decay if decoupled else 1
        values |= _lerp(T(1 - hypers["beta1"]))
        values |= {"beta2": hypers["beta2"], "one_minus_beta2": 1 - hypers["beta2"]}
        values |= _divisor("bias_correction2_sqrt", T((1 - hypers["beta2"] ** t) ** 0.5))
        values["neg_step_size"] = -(hypers["lr"] / (1 - hypers["beta1"] ** t))
    return {name: T(value) for name, value in values.items()}


def _lerp(weight):
    near = abs(weight) < 0.5
    return {"lerp_weight": weight if near else weight - type(weight)(1), "lerp_from_grad": 0 if near else 1}


def _divisor(name, value):
    """With the two numbers that add up to its inverse, 0 where a division by multiplications would not be exact."""
    moderate, T = 2.0**-30 < value <= 1, type(value)
    inverse = 1 / float(value) if moderate else 0.0
    return {name: value, f"{name}_reciprocal": T(inverse), f"{name}_rest": T(inverse - float(T(inverse)))}
