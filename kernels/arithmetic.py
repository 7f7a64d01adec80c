"""Correctly rounded arithmetic that reads the same for fp32 and fp64; the update functions are written with it.

On fp32, Triton's `/` and `tl.sqrt` are approximations; its `_rn` forms are exact but refuse fp64, where the plain ones
are exact. At the end, fp32 in two parts and rounding with random bits, as in csrc/step/round.h and philox.h.
"""

import torch
import triton
import triton.language as tl

# Triton 3.6 for ROCm lowers a square root as if subnormal inputs were flushed to zero, which they are not.
SQRT_NEEDS_NORMAL = tl.constexpr(torch.version.hip is not None and triton.__version__.startswith("3.6."))


@triton.jit
def neg(a):
    """-a. Before Triton 3.8 `-a` is 0 - a, which has the wrong sign for a zero."""
    return a * -1.0


@triton.jit
def div(a, b):
    """a / b, rounded once."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def sqrt(a):
    """The square root of a, rounded once."""
    if a.dtype == tl.float64:
        return tl.sqrt(a)
    elif SQRT_NEEDS_NORMAL:
        small = a < 2.0**-96
        return tl.sqrt_rn(tl.where(small, a * 2.0**32, a)) * tl.where(small, 2.0**-16, 1.0)
    else:
        return tl.sqrt_rn(a)


@triton.jit
def divisor(number, T: tl.constexpr):
    """A number by which roots will be divided: rounded to T, then reciprocal and rest, reciprocal + rest = 1 / value.

    Both are 0 where that could overflow or lose bits.
    """
    value = number.to(T)
    moderate = (value > 2.0**-30) & (value <= 1)
    inverse = 1 / value.to(tl.float64)
    reciprocal = inverse.to(T)
    rest = (inverse - reciprocal.to(tl.float64)).to(T)
    return value, tl.where(moderate, reciprocal, 0.0), tl.where(moderate, rest, 0.0)


@triton.jit
def divide_root(root, value, reciprocal, rest):
    """root / value, rounded once: in fp32 by multiplications, as csrc/step/algorithms.h explains."""
    if value.dtype == tl.float64:
        return root / value
    else:
        near = tl.fma(root, reciprocal, root * rest)
        quotient = tl.fma(tl.fma(neg(near), value, root), reciprocal, near)
        quotient = tl.maximum(quotient, root)  # zero, infinity and NaN stay what they are
        if reciprocal == 0:
            quotient = div(root, value)
        return quotient


@triton.jit
def maximum(a, b):
    """The larger of a and b; NaN where one of them is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def lerp_weight(w):
    """torch.lerp(a, b, w) = fma(lerp_weight, b - a, lerp_from_end ? b : a): torch starts from the nearer end."""
    return tl.where((w < 0.5) & (w > -0.5), w, w - 1)


@triton.jit
def lerp_from_end(w):
    return tl.where((w < 0.5) & (w > -0.5), 0.0, 1.0)


@triton.jit
def lerp(a, b, weight):
    """torch.lerp(a, b, weight)."""
    return tl.fma(lerp_weight(weight), b - a, tl.where(lerp_from_end(weight) != 0, b, a))


@triton.jit
def power(base, exponent):
    """base ** exponent of fp64 numbers, the exponent whole and not negative, by repeated squaring.

    Every product carries along what its rounding lost: 1 - beta ** t would magnify it a thousandfold at beta = 0.999.
    """
    result, result_lost, base_lost = base * 0 + 1, base * 0, base * 0
    exponent = exponent.to(tl.int64)
    while exponent > 0:
        if exponent & 1:
            product = result * base
            result_lost = tl.fma(result, base, neg(product)) + (result * base_lost + result_lost * base)
            result = product
        product = base * base
        base_lost = tl.fma(base, base, neg(product)) + 2 * base * base_lost
        base = product
        exponent >>= 1
    return result + result_lost


# fp32 in two parts of 16 bits, and rounding with random bits


@triton.jit
def join(number, remainder):
    """The fp32 number of a bf16 number and its int16 remainder; the bf16 number where the remainder is another's."""
    bits = number.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    joined = (bits + remainder.to(tl.int32).to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    return tl.where(joined == joined, joined, bits.to(tl.float32, bitcast=True))


@triton.jit
def part(value):
    """The nearest bf16 number, of two the one further from zero, and the int16 remainder that `join` adds to it."""
    bits = value.to(tl.uint32, bitcast=True)
    bits = tl.where(value == value, bits, 0x7FC00000)
    number = ((bits + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return number, bits.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def narrow_stochastically(value, random, S: tl.constexpr):
    """An fp32 value in S, bf16 or fp16: away from zero with the probability of what is cut off, by 16 random bits."""
    bits = value.to(tl.uint32, bitcast=True)
    random = random.to(tl.uint32)
    if S == tl.bfloat16:
        rounded = tl.where(value == value, (bits + random) >> 16, 0x7FC0)
    else:
        tl.static_assert(S == tl.float16)
        magnitude = bits & 0x7FFFFFFF
        is_small = magnitude < 113 << 23
        small = tl.where(is_small, magnitude, 0).to(tl.float32, bitcast=True)
        subnormal = ((small * 2.0**40).to(tl.int32).to(tl.uint32, bitcast=True) + random) >> 16
        normal = (magnitude - (112 << 23) + (random >> 3)) >> 13
        finite = tl.where(is_small, subnormal, normal)
        special = tl.where(magnitude > 0x7F800000, 0x7E00, 0x7C00)
        rounded = (bits >> 16 & 0x8000) | tl.where(magnitude >= 0x47800000, special, finite)
    return rounded.to(tl.uint16).to(S, bitcast=True)


@triton.jit
def random_bits(key0, key1, counter1, counter2, counter3, block, place):
    """16 random bits, as uint32, of the element at a place, 0 to 7, of a block (int64): those of csrc/step/philox.h.

    The rest are uint32, of the tensor. Blocks and places broadcast: words are made once for each of `block`.
    """
    low = block.to(tl.uint32)
    high = counter1 + (block >> 32).to(tl.uint32)
    a, b, c, d = tl.philox_impl(low, high, low * 0 + counter2, low * 0 + counter3, key0, key1)
    word = tl.where(place < 4, tl.where(place < 2, a, b), tl.where(place < 6, c, d))
    return word >> (place & 1).to(tl.uint32) * 16 & 0xFFFF
